"""95 % intervals: how far a figure of a few images can be from that of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Z = 1.959964  # of the normal distribution, for 95 % on both sides together
RESAMPLES, AT_ONCE = 1000, 100  # of a bootstrap: what is usual for percentiles of 95 %; and how many lie in memory together


def wilson(share: float, count: float, z: float = Z) -> tuple[float, float]:
    """Interval of a share of ``count`` independent trials (Wilson, https://doi.org/10.2307/2276774).

    Unlike mean and standard error, it says something where all or none of few trials succeeded.
    """
    if count <= 0:
        return 0.0, 1.0
    square = z * z / count
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    # Rounding must not put the share outside of its own interval.
    return max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))


def trials_needed(share: float, z: float = Z) -> int:
    """How many trials that all succeed prove ``share`` by :func:`wilson`: n / (n + z^2) >= share."""
    return 10**9 if share >= 1 else math.ceil(share * z * z / (1 - share) - 1e-9)


def of_mean(values: Tensor, z: float = Z) -> tuple[float, float]:
    """Interval of the mean of values (n,), by the normal distribution; the mean itself where there is one value."""
    mean = float(values.double().mean())
    half = z * standard_error(values)
    return mean - half, mean + half


def standard_error(values: Tensor) -> float:
    """Of the mean of values (n,); 0 for fewer than two."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def of_shares(shares: Tensor, each: int) -> tuple[float, float]:
    """Interval of the mean of one share an image (n,), each of ``each`` decisions.

    One decision an image is a trial. Decisions of one image depend on each other, so that images, not decisions, are
    counted; but where no image differs from another, Wilson's interval of all decisions is what is left to say.
    """
    mean = float(shares.double().mean())
    if each == 1:
        return wilson(mean, len(shares))
    low, high = of_mean(shares)
    all_low, all_high = wilson(mean, len(shares) * each)
    return max(0.0, min(low, all_low)), min(1.0, max(high, all_high))


def of_ratio(hits: Tensor, trials: Tensor) -> tuple[float, float]:
    """Interval of the share of trials that succeeded: ``trials`` (n,) of an image, of which ``hits`` (n,) did.

    Trials of one image depend on each other. So the interval is Wilson's of as many independent trials as have the standard error
    that the share has over images; at most of all.
    """
    hits, trials = hits.double(), trials.double()
    total, count = float(trials.sum()), len(trials)
    if total <= 0:
        return 0.0, 1.0
    share = float(hits.sum()) / total
    squared_error = float((hits - share * trials).square().sum()) / total**2 * count / max(count - 1, 1)
    alike = share * (1 - share) / squared_error if squared_error > 0 else total
    return wilson(share, min(total, alike))


def bootstrap(values: Tensor, figure: Callable[[Tensor], Tensor], seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval of a figure over images that are drawn again and again with replacement (Efron,
    https://doi.org/10.1214/aos/1176344552); None for fewer than two images, which say nothing about others.

    Args:
        values: (n, ...), an image each.
        figure: from sums over n drawn images (draws, ...) to the figures (draws,); NaN where a draw has none.
        seed: of the draws.
    """
    count = len(values)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    found, each = [], values.double().reshape(count, -1)
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = torch.randint(count, (AT_ONCE, count), generator=generator)
        times = torch.zeros(AT_ONCE, count, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))
        found.append(figure((times @ each).unflatten(1, values.shape[1:] or (1,))))
    low, high = torch.cat(found).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
