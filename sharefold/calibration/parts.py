"""The parts of the calibration images: what is fitted, what decides and what is reported. No image is in two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of all images, for deciding and for reporting each. Most are fitted to: accuracy comes from those.
SHARE = 0.15
# Of few images more are needed to say anything, of many no more are.
FEWEST_REPORTED, MOST_REPORTED = 50, 500
# From so many images on something is reported. Of fewer, every image is needed to convert well.
FEWEST_IMAGES = 200
# Whoever asks for larger parts gets at most this share for each.
LARGEST_SHARE = 0.3
# Fewer images fit and decide at once, and report nothing.
FEWEST_APART = 5


@dataclass(frozen=True)
class Parts:
    """Indices (m,) int64, rising, into the calibration images; disjoint, except that fewer than five fit and decide at once.

    Attributes:
        fit: what statistics, layers, repairs and rounding are fitted to.
        decide: what plans and repairs have to prove themselves on.
        report: what the finished network is measured on, once; empty where there are too few images.
    """

    fit: Tensor
    decide: Tensor
    report: Tensor


def parts_of(count: int, seed: int = 0, held_out: int | None = None) -> Parts:
    """Parts of ``count`` images, drawn by ``seed`` alone.

    Args:
        held_out: how many images ``decide`` and ``report`` should have at least, each; they get at most ``LARGEST_SHARE``.
    """
    index = torch.arange(count)
    if count < FEWEST_APART:
        return Parts(index, index, index[:0])
    decided = max(1, round(SHARE * count))
    reported = min(max(decided, FEWEST_REPORTED), MOST_REPORTED) if count >= FEWEST_IMAGES else 0
    if held_out is not None and reported:
        wanted = min(held_out, int(LARGEST_SHARE * count))
        decided, reported = max(decided, wanted), max(reported, wanted)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    report, decide, fit = (part.sort().values for part in order.split([reported, decided, count - reported - decided]))
    return Parts(fit, decide, report)


def images_for(held_out: int) -> int:
    """How many images give ``decide`` and ``report`` so many each."""
    return max(FEWEST_IMAGES, -(-held_out * 10 // round(10 * LARGEST_SHARE)))
