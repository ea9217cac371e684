"""Moments of pairs (what a layer is given, what it should give), added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.solvers.data_norm import without_mean


@dataclass
class PairSums:
    """Means over all samples of a layer's inputs x and wanted outputs y, per conv group.

    ``gram`` (G, N, N) of x, ``mean`` (G, N), ``cross`` (G, O/G, N) of y with x, ``mean_y`` (G, O/G), ``variance`` (O,) of y.
    ``gram``, ``cross`` and ``variance`` are centred where that was asked for.
    """

    gram: Tensor
    mean: Tensor
    cross: Tensor
    mean_y: Tensor
    variance: Tensor


class PairMoments:
    """Adds up on the CPU; means in float64, products in ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.count = 0
        self._sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """One batch: x (G, N, P) and y (G, O/G, P) at the same P positions."""
        products = [(left @ x.transpose(1, 2)).cpu().to(self.dtype) for left in (x, y)]
        rows = [part.cpu().double() for part in (x.sum(2), y.sum(2), y.square().sum(2))]
        found = [*products, *rows]
        self._sums = found if not self._sums else [old + new for old, new in zip(self._sums, found, strict=True)]
        self.count += x.shape[2]

    def merged(self, other: PairMoments) -> PairMoments:
        """The moments of both together."""
        both = PairMoments(self.dtype)
        both.count = self.count + other.count
        full = [part for part in (self._sums, other._sums) if part]
        both._sums = full[0] if len(full) == 1 else [a + b for a, b in zip(*full, strict=True)] if full else []
        return both

    def result(self, centered: bool) -> PairSums | None:
        """None when nothing was added, or something that is not finite."""
        if not self._sums or not all(bool(torch.isfinite(s).all()) for s in self._sums):
            return None
        gram, cross, mean, mean_y, square = (total / self.count for total in self._sums)
        variance = square - mean_y.square() if centered else square
        if centered:
            small, small_y = mean.to(gram), mean_y.to(gram)
            gram = without_mean(gram, small)
            cross = cross - small_y.unsqueeze(2) * small.unsqueeze(1)
        return PairSums(gram, mean, cross, mean_y, variance.clamp_min(0).flatten())
