"""Moments of what a layer is given and of what it should give, added up batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.gram import gram

# Rounding error of a summed second moment, in units of the type's precision.
ROUNDING = 16


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


class Moments:
    """Sums of inputs x, of their products, and where wanted outputs y come with them of y and of its products with x.

    Args:
        dtype: of the summed products; single values are summed in float64.
        device: where the sums are kept, one with float64; by default where the samples are.
    """

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> None:
        self.dtype, self.device = dtype, device
        self.count = self.batches = 0
        self._products: list[Tensor] = []  # of x with x, of y with x
        self._values: list[Tensor] = []  # of x, of y, of y squared
        self._squares = torch.zeros((), dtype=torch.float64)  # (G,): of every batch's product of x with x, for the noise

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """One batch: x (G, N, P) and, always or never, y (G, O/G, P) at the same P positions.

        Raises:
            SharefoldError: other groups or features than before.
        """
        sides = [x] if y is None else [x, y]
        with torch.autocast(x.device.type, enabled=False):
            sides = [side.detach().to(torch.promote_types(side.dtype, torch.float32)) for side in sides]
            products = [gram(sides[0]), *(side @ sides[0].transpose(1, 2) for side in sides[1:])]
            products = [self._kept(product, self.dtype) for product in products]
            values = [side.sum(2) for side in sides] + [side.square().sum(2) for side in sides[1:]]
        values = [self._kept(value, torch.float64) for value in values]
        shapes = [tuple(part.shape) for part in products]
        if self._products and shapes != [tuple(part.shape) for part in self._products]:
            raise SharefoldError(f"moments: a batch of {tuple(x.shape)}: expected the groups and features of those before")
        self._squares = self._squares + products[0].square().sum((1, 2)).cpu().double()
        if not self.count:
            self._products, self._values = products, values
        else:
            for total, part in zip(self._products + self._values, products + values, strict=True):
                total += part
        self.count += x.shape[2]
        self.batches += 1

    def _kept(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.to(tensor.device if self.device is None else self.device).to(dtype)

    def merged(self, other: Moments) -> Moments:
        """The moments of both together."""
        both = Moments(self.dtype, self.device)
        both._products = _sum(self._products, other._products)
        both._values = _sum(self._values, other._values)
        both._squares = self._squares + other._squares
        both.count, both.batches = self.count + other.count, self.batches + other.batches
        return both

    def noise(self) -> Tensor:
        """(G,): expected squared Frobenius norm of what separates the moment of x from that of all images there could be.

        Batches count as independent, not samples, since those of one image are alike; batches should be of one size.
        Infinite for a single batch.
        """
        total, batches = self._total(), self.batches
        if batches < 2:
            return torch.full_like(self._squares, float("inf"))
        spread = self._squares - self._products[0].double().square().sum((1, 2)).cpu() / batches
        return (spread / total**2 * batches / (batches - 1)).clamp_min(0)

    @property
    def mean(self) -> Tensor:
        """(G, N), of x, float64."""
        return self._values[0] / self._total()

    def covariance(self, centered: bool = False) -> Tensor:
        """``E[x x^T]`` (G, N, N); with ``centered`` the covariance, for layers whose mean a bias absorbs.

        Raises:
            SharefoldError: nothing was added.
        """
        total = self._total()
        moment = self._products[0] / total
        if centered:
            moment = without_mean(moment, self.mean.to(moment))
        return (moment + moment.transpose(1, 2)) / 2

    def pairs(self, centered: bool) -> PairSums | None:
        """None when nothing was added, or something that is not finite."""
        if not self.count or not all(bool(torch.isfinite(s).all()) for s in (*self._products, *self._values)):
            return None
        gram, cross = (total / self.count for total in self._products)
        mean, mean_y, square = (total / self.count for total in self._values)
        variance = square - mean_y.square() if centered else square
        if centered:
            small, small_y = mean.to(gram), mean_y.to(gram)
            gram = without_mean(gram, small)
            cross = cross - small_y.unsqueeze(2) * small.unsqueeze(1)
        return PairSums(gram, mean, cross, mean_y, variance.clamp_min(0).flatten())

    def _total(self) -> int:
        if not self.count:
            raise SharefoldError("moments: no sample was seen: run the calibration images through the layer first")
        return self.count


def _sum(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(old, new, strict=True)] if old and new else old or new


def without_mean(moment: Tensor, mean: Tensor) -> Tensor:
    """``E[x x^T] - m m^T`` (G, N, N) of second moments and means (G, N).

    Of inputs that hardly vary the difference is rounding error, and may be negative: a floor makes it harmless, one that
    outweighs the largest eigenvalue that errors of all entries together can have where the variance does not.
    """
    eps, size = torch.finfo(moment.dtype).eps, moment.diagonal(dim1=1, dim2=2)
    result = moment - mean.unsqueeze(2) * mean.unsqueeze(1)
    variance = result.diagonal(dim1=1, dim2=2).mean(1)
    floor = ROUNDING * eps * size.mean(1) + (2 * eps * size.sum(1) - variance / 100).clamp_min(0)
    result.diagonal(dim1=1, dim2=2).add_(floor.unsqueeze(1))
    return result
