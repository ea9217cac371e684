"""Coefficients of one layer from samples: how strongly they are pulled to the old ones, and how far the step goes.

Both are chosen on images that the least squares did not see. A layer with few samples for its features (a classifier behind a
thousand pooled features) then hardly moves in directions that the images do not show, so that classes which are not among them
survive; a layer with many is fitted freely.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.solvers.least_squares import PulledLeastSquares
from sharefold.solvers.moments import Moments, PairSums

# Pulls that compete, as shares of the mean diagonal of the normal equations (https://doi.org/10.1080/00401706.1979.10489751).
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Linear:
    """An affine map of responses: ``weight`` (G, O/G, M) and ``constant`` (G, O/G), float64."""

    weight: Tensor
    constant: Tensor

    def __call__(self, responses: Tensor) -> Tensor:
        """(G, O/G, P) for responses (G, M, P), in their type."""
        return self.weight.to(responses) @ responses + self.constant.to(responses).unsqueeze(2)

    def towards(self, other: Linear, step: float) -> Linear:
        """Between this map (step 0) and ``other`` (step 1)."""
        return Linear(torch.lerp(self.weight, other.weight, step), torch.lerp(self.constant, other.constant, step))

    def error(self, sums: PairSums) -> float:
        """Mean squared difference from the wanted outputs, summed over channels, from sums that are not centred."""
        through = self.weight @ sums.gram
        square = sums.variance.reshape(self.constant.shape) + self.constant.square()
        square = square - 2 * self.constant * sums.mean_y + ((through - 2 * sums.cross) * self.weight).sum(2)
        return float((square + 2 * self.constant * (self.weight @ sums.mean.unsqueeze(2)).squeeze(2)).sum())


def sums_of(responses: Tensor, wanted: Tensor) -> PairSums | None:
    """Moments, not centred, of responses (G, M, P) and wanted outputs (G, O/G, P); None without any."""
    if not responses.shape[2]:
        return None
    moments = Moments(device="cpu")
    moments.add(responses, wanted)
    return moments.pairs(centered=False)


def halves_of(
    responses: Tensor, wanted: Tensor, image: Tensor
) -> tuple[PairSums | None, PairSums | None, PairSums | None]:
    """As :func:`sums_of`: of the samples of even images, of those of odd ones, and of all.

    Args:
        image: (P,) the number of the image that each sample is of.
    """
    halves = Moments(device="cpu"), Moments(device="cpu")
    for remainder, moments in enumerate(halves):
        pick = image % 2 == remainder
        if bool(pick.any()):
            moments.add(responses[..., pick], wanted[..., pick])
    first, second, whole = (moments.pairs(centered=False) for moments in (*halves, halves[0].merged(halves[1])))
    return first, second, whole


def fitted(sums: PairSums, start: Linear, ridge: float, free: bool) -> Linear | None:
    """The map that gives the wanted outputs best, pulled to ``start``; None if there is no finite one.

    Args:
        sums: not centred.
        free: whether the constant may change; else it stays and the weight makes up for it.
    """
    gram, cross = sums.gram, sums.cross
    if free:
        gram = gram - sums.mean.unsqueeze(2) * sums.mean.unsqueeze(1)
        cross = cross - sums.mean_y.unsqueeze(2) * sums.mean.unsqueeze(1)
    else:
        cross = cross - start.constant.unsqueeze(2) * sums.mean.unsqueeze(1)
    weight = PulledLeastSquares(gram, ridge).solve(cross, start.weight)
    if weight is None:
        return None
    return Linear(weight, sums.mean_y - (weight @ sums.mean.unsqueeze(2)).squeeze(2) if free else start.constant)


def best_ridge(halves: tuple[PairSums, PairSums], start: Linear, free: bool) -> float:
    """The pull whose maps, fitted to one half of the samples, do best on the other."""
    totals = []
    for ridge in RIDGES:
        total = 0.0
        for here, there in (halves, halves[::-1]):
            found = fitted(here, start, ridge, free)
            total += float("inf") if found is None else found.error(there)
        totals.append(total)
    return RIDGES[min(range(len(RIDGES)), key=totals.__getitem__)]


def best_step(old: Linear, new: Linear, sums: PairSums) -> float:
    """How far to go from ``old`` to ``new``, 0 to 1, so that the error on these samples is least: it is a parabola."""
    start, middle, end = (old.towards(new, step).error(sums) for step in (0.0, 0.5, 1.0))
    bend = 2 * (start - 2 * middle + end)
    if not bend > 0:
        return 1.0 if end < start else 0.0
    return min(max((3 * start - 4 * middle + end) / (2 * bend), 0.0), 1.0)
