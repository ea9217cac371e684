"""Factors some of whose columns are the identity's: those columns are not kept.

See :mod:`sharefold.solvers.interpolative` for how a factor comes to have such columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.layers.weight_cache import Kept


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


def whole_factor(
    free: Tensor, pivots: Tensor | None, row: tuple[int, ...], kept: Kept | None = None, x: Tensor | None = None
) -> Tensor:
    """A factor whose rows have the shape ``row`` (one size may be -1).

    For an input ``x`` it is kept in ``kept`` from run to run where it has to be put together.
    """
    if pivots is None:
        return free

    def make() -> Tensor:
        return with_pivots(free, pivots).unflatten(1, row)

    return make() if kept is None else kept.get(x, (free, pivots), make)


def free_moments(moments: Tensor, pivots: Tensor | None) -> Tensor:
    """(..., M, M): of moments (..., N, N), those of the columns that a factor with ``pivots`` keeps."""
    if pivots is None:
        return moments
    free = free_columns(pivots, moments.shape[-1]).to(moments.device)
    return moments[..., free, :][..., free]


def free_columns(pivots: Tensor, size: int) -> Tensor:
    """Indices (N - R,) of the columns that are kept, ascending, on the CPU."""
    kept = torch.ones(size, dtype=torch.bool)
    kept[pivots.long().cpu()] = False
    return kept.nonzero().flatten()
