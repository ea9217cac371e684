"""Separable kernels: (h x 1, then 1 x w) convolutions in a layer's place, ``W_k[o, i, y, x] ~ sum_r H_k[o, r, x] V_k[r, i, y]``.

The form of Jaderberg et al. (arXiv 1405.3866). The vertical filters are own filters in every column of the kernel, to which
:mod:`sharefold.solvers.variable_projection` finds the horizontal ones as coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.curves import CurvePoint, correct_curve, default_ranks, nested_errors
from sharefold.solvers.data_norm import RIDGE, Problem
from sharefold.solvers.filter_descent import fitted, refine
from sharefold.solvers.variable_projection import VariableProjection

# A solution may stop when two iterations on end lower the error by less than this fraction.
TOLERANCE = 1e-4


@dataclass
class SpatialSolution:
    """Two thin convolutions for every layer.

    Attributes:
        vertical: (K, R, I, h, 1), orthonormal filters per layer; runs first.
        horizontal: (K, O, R, 1, w).
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed) at the start and after every iteration; it never rises.
    """

    vertical: Tensor
    horizontal: Tensor
    errors: Tensor
    history: list[float] = field(default_factory=list)

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        return torch.einsum("korx,kriy->koiyx", self.horizontal.squeeze(3), self.vertical.squeeze(4)).flatten(2)


def cost(rank: int, members: int, rows: int, columns: int, kernel: tuple[int, int]) -> int:
    """Parameters of ``members`` layers in separable form."""
    wide = kernel[1]
    return members * rank * (columns // wide + rows * wide)


def max_rank(problem: Problem) -> int:
    wide = problem.kernel[1]
    return min(problem.columns // wide, problem.rows * wide)


def solve(
    problem: Problem, rank: int, iterations: int = 20, tol: float = TOLERANCE, *, ridge: float = RIDGE
) -> SpatialSolution:
    """Fits separable kernels to every layer under the data norm.

    Args:
        rank: channels between the two convolutions, 1 .. min(I * h, O * w).
        iterations, tol: of :func:`sharefold.solvers.filter_descent.refine`; with 0 the vertical filters are those of the
            unfolded SVD.
        ridge: floor of the moments, relative to their mean diagonal.

    Returns:
        Factors in the dtype of ``problem.weights``; errors are measured without the ridge.

    Raises:
        SharefoldError: the rank does not fit the layers.
    """
    limit = max_rank(problem)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"spatial: rank {rank}: these layers allow 1 to {limit}")
    dtype, (high, wide), members = problem.weights.dtype, problem.kernel, problem.members
    work, none, vertical, history = fitted(problem, (0, rank), iterations=iterations, tol=tol, ridge=ridge)
    horizontal = work.coefficients(none, vertical)
    errors = work.problem.errors(horizontal @ work.stack(none, vertical))
    return SpatialSolution(
        vertical.reshape(members, rank, -1, high, 1).to(dtype),
        horizontal.reshape(members, problem.rows, rank, 1, wide).to(dtype),
        errors.to(dtype),
        history,
    )


def curve(
    problem: Problem, ranks: Sequence[int] | None = None, *, iterations: int = 0, solved: int = 5, ridge: float = RIDGE
) -> list[CurvePoint]:
    """Errors and cost at several ranks of the separable form.

    Without ``iterations`` the errors are those of the unfolded SVD's vertical filters with best horizontal ones; with so many,
    ``solved`` of the ranks are solved and the others corrected by the interpolated log ratio.
    """
    problem = problem.working()
    limit = max_rank(problem)
    members, rows, columns = problem.weights.shape
    wide = problem.kernel[1]
    if ranks is None:
        ranks = default_ranks(max(1, min(limit, rows * columns // (columns // wide + rows * wide))))
    ranks = sorted({min(limit, max(1, int(r))) for r in ranks})
    work = VariableProjection(problem, ridge=ridge)
    none, vertical = work.start(0, ranks[-1])
    table = nested_errors(problem, work.spread(vertical), ridge)
    points = [CurvePoint(r, cost(r, members, rows, columns, problem.kernel), table[:, r * wide - 1]) for r in ranks]
    if not iterations:
        return points

    def exact(rank: int) -> Tensor:
        found = refine(work, none, vertical[:, :rank], iterations=iterations, tol=TOLERANCE)[1]
        return work.errors(none, found)

    return correct_curve(points, exact, solved)
