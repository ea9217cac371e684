"""The parts of the calibration images: what is fitted, what decides and what is reported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Every fifth image decides, so that both parts see all of an ordered set.
STRIDE = 5


@dataclass(frozen=True)
class Parts:
    """Indices (m,) int64, rising, into the calibration images.

    Attributes:
        fit: what layers are fitted to.
        decide: what repairs have to prove themselves on.
    """

    fit: Tensor
    decide: Tensor


def parts_of(count: int) -> Parts:
    """Parts of ``count`` images; fewer than five serve as both."""
    index = torch.arange(count)
    if count < STRIDE:
        return Parts(index, index)
    decide = index % STRIDE == 0
    return Parts(index[~decide], index[decide])
