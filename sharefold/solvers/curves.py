"""Rank curves: what a method costs and how far off it is at several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.data_norm import Problem, moment_floors

# Relative errors below this are as good as none: what they are, and their ratios, is a matter of rounding.
NEGLIGIBLE = 1e-4


@dataclass
class CurvePoint:
    """One setting of a method: ``cost`` in parameters of the whole group, relative errors (K,) of its layers."""

    rank: int
    cost: int
    errors: Tensor


def default_ranks(limit: int, count: int = 24) -> list[int]:
    """About ``count`` ranks from 1 to ``limit``, geometrically spaced."""
    grid = np.geomspace(1, limit, count).round().astype(int)
    return sorted({int(r) for r in grid})


def correct_curve(points: Sequence[CurvePoint], evaluate: Callable[[int], Tensor], anchors: int) -> list[CurvePoint]:
    """Replace estimated errors by exact ones at a few ranks and carry the log ratio over to the ranks between.

    ``evaluate(rank)`` returns the exact errors (K,). Ratios are interpolated linearly in log rank. At the largest rank both
    errors may be next to nothing, and their ratio anything: it counts as that of errors that are :data:`NEGLIGIBLE` beside it.
    """
    count = len(points)
    picked = sorted({int(i) for i in np.linspace(0, count - 1, min(anchors, count)).round()})
    logs = np.log([p.rank for p in points])
    exact = {i: evaluate(points[i].rank).to(points[i].errors) for i in picked}
    ratios = np.stack(
        [
            ((exact[i].double() + NEGLIGIBLE).log() - (points[i].errors.double() + NEGLIGIBLE).log()).cpu().numpy()
            for i in picked
        ]
    )
    result = []
    for i, point in enumerate(points):
        if i in exact:
            result.append(CurvePoint(point.rank, point.cost, exact[i]))
            continue
        shift = np.array([np.interp(logs[i], logs[picked], ratios[:, k]) for k in range(ratios.shape[1])])
        errors = point.errors * torch.from_numpy(np.exp(shift)).to(point.errors)
        result.append(CurvePoint(point.rank, point.cost, errors))
    return result


def nested_errors(problem: Problem, filters: Tensor, ridge: float) -> Tensor:
    """Relative errors (K, R) with the first 1..R of the ordered filters and best coefficients.

    One Cholesky factor per layer serves all ranks, because its leading blocks are the factors of the leading ranks.

    Args:
        filters: (R, N), or (K, R, N) when every layer has its own; rows near orthonormal, most important first.
        ridge: floor of the moments, relative to their mean diagonal.

    Raises:
        SharefoldError: a moment or weight is NaN or infinite.
    """
    floors = moment_floors(problem, ridge)
    size = filters.shape[-2]
    eye = torch.eye(size, dtype=filters.dtype, device=filters.device)
    result = []
    for k in range(problem.members):
        rows = filters if filters.dim() == 2 else filters[k]
        gram = rows @ problem.second[k] @ rows.T + floors[k] * (rows @ rows.T)
        if not bool(torch.isfinite(gram).all()):  # no jitter would ever help
            raise SharefoldError(
                "the moments of a layer are not finite: check its weights, the calibration images, and whether the network says "
                "NaN of some of them"
            )
        jitter = 0.0
        factor, info = torch.linalg.cholesky_ex(gram)
        while bool(info):
            jitter = max(10 * jitter, 1e-7 * float(gram.diagonal().mean()))
            factor, info = torch.linalg.cholesky_ex(gram + jitter * eye)
        cross = (problem.weighted[k] + floors[k] * problem.weights[k]) @ rows.T
        scores = torch.linalg.solve_triangular(factor, cross.T, upper=False)
        gains = (scores.square() * problem.row_metric[k]).sum(dim=1)
        energy = problem.energy[k].clamp_min(torch.finfo(gains.dtype).tiny)
        result.append((1 - gains.cumsum(dim=0) / energy).clamp_min(0))
    return torch.stack(result)
