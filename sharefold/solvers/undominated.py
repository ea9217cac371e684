"""Points that no other point beats in every coordinate."""

from __future__ import annotations

import numpy as np

# So many points are compared each with each; of more, each with the best of those below some thresholds.
PAIRWISE, THRESHOLDS = 1500, 48


def undominated(points: np.ndarray) -> np.ndarray:
    """Indices, rising, of the rows of (n, d) that no other row is at most equal to in every column; of equal rows the first."""
    left = np.flatnonzero(~dominated(points)) if len(points) > PAIRWISE else np.arange(len(points))
    return left[~_beaten(points[left])]


def dominated(points: np.ndarray) -> np.ndarray:
    """(n,) whether another row of (n, d) is at most equal in every column, d >= 2; where there are many, some that are go
    unnoticed. Of equal rows one is not dominated."""
    if len(points) <= PAIRWISE:
        return _beaten(points)
    # Rows sorted by the first column are dominated by earlier ones alone.
    order = np.lexsort(points.T[::-1])
    rows, found = points[order], np.zeros(len(points), bool)
    last = rows[:, -1]
    middle = rows[:, 1:-1]
    levels = np.unique(np.quantile(middle, np.linspace(0, 1, THRESHOLDS + 1), axis=0, method="lower"), axis=0)
    for level in levels:
        below = (middle <= level).all(1)
        least = np.minimum.accumulate(np.where(below, last, np.inf))
        earlier = np.concatenate([[np.inf], least[:-1]])
        found |= (middle >= level).all(1) & (earlier <= last)
    result = np.zeros(len(points), bool)
    result[order] = found
    return result


def _beaten(points: np.ndarray) -> np.ndarray:
    """(n,) as :func:`dominated`, each compared with each."""
    order = np.lexsort(points.T[::-1])
    rows = points[order]
    no_more = np.ones((len(rows), len(rows)), bool)
    for column in rows.T:
        no_more &= column[:, None] <= column
    result = np.zeros(len(rows), bool)
    # Whatever beats a row stands before it: it is less in some column and more in none, or equal and earlier.
    result[order] = np.triu(no_more, 1).any(0)
    return result
