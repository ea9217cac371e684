"""Factors without the numbers that say nothing: columns that are the identity are not kept.

See :mod:`sharefold.solvers.interpolative` for how a factor comes to have such columns.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_pivots(free: Tensor, pivots: Tensor) -> Tensor:
    """The matrix (R, N) whose columns ``pivots`` (R,) are the identity's, in their order, and the others ``free``.

    Args:
        free: (R, N - R), the other columns from left to right; gradients reach it.
        pivots: (R,) integers, distinct, from 0 to N - 1.
    """
    count, others = free.shape
    pivots = pivots.long()
    size = count + others
    own = torch.arange(count, device=free.device)
    taken = torch.zeros(size, dtype=torch.long, device=free.device).scatter(0, pivots, torch.ones_like(own))
    # Column n is free column n less the pivots before it.
    place = torch.arange(size, device=free.device) + count - taken.cumsum(0)
    place = place.scatter(0, pivots, own)
    return torch.cat([torch.eye(count, dtype=free.dtype, device=free.device), free], 1).index_select(1, place)


def free_columns(pivots: Tensor, size: int) -> Tensor:
    """Indices (N - R,) of the columns that are kept, ascending, on the CPU."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[pivots.long().cpu()] = False
    return kept.nonzero().flatten()
