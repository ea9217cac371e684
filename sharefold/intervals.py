"""95 % intervals: how far a share of a few images can be from that of all of them."""

from __future__ import annotations

import math

Z = 1.959964  # of the normal distribution, for 95 % on both sides together


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
