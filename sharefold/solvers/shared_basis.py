"""Shared filter basis: every layer of a group is its own mix of common filters, ``W_k ~ C_k B``.

The form is that of Deeply Shared Filter Bases (NeurIPS 2021, arXiv 2006.05066), optionally with a few filters of its own for
every layer, ``W_k ~ C_k [U_k; B]``. Here it is fitted to trained weights, by
:mod:`sharefold.solvers.variable_projection` from the whitened singular vectors of the stacked layers on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.curves import CurvePoint, correct_curve, default_ranks, nested_errors
from sharefold.solvers.data_norm import RIDGE, Problem
from sharefold.solvers.directions import orthonormal
from sharefold.solvers.filter_descent import fitted, refine
from sharefold.solvers.variable_projection import VariableProjection

# A solution may stop when two iterations on end lower the error by less than this fraction.
TOLERANCE = 5e-4


@dataclass
class BasisSolution:
    """``W_k ~ coefficients_k @ [unique_k; basis]``.

    Attributes:
        basis: (R, N), orthonormal rows.
        coefficients: (K, O, U + R), the columns of a layer's own filters first.
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed) at the start and after every iteration; it never rises.
        unique: (K, U, N) with orthonormal rows, or None.
    """

    basis: Tensor
    coefficients: Tensor
    errors: Tensor
    history: list[float] = field(default_factory=list)
    unique: Tensor | None = None

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        shared = self.basis.expand(len(self.coefficients), *self.basis.shape)
        return self.coefficients @ (shared if self.unique is None else torch.cat([self.unique, shared], dim=1))


def cost(rank: int, members: int, rows: int, columns: int, unique: int = 0) -> int:
    """Parameters of a group of ``members`` layers: shared filters, own filters and coefficients."""
    return rank * columns + members * (unique * columns + rows * (rank + unique))


def max_rank(problem: Problem) -> int:
    """Ranks above this change nothing: the stacked layers span no more."""
    return min(problem.columns, problem.members * problem.rows)


def spectrum(problem: Problem, rank: int, ridge: float = RIDGE) -> Tensor:
    """One-shot basis: ordered filters (rank, N), orthonormal, of the whitened SVD of the stacked layers.

    With S the mean moment and ``S = F F^T``, the right singular vectors V of the stacked ``sqrt(w_k) D_k W_k F`` give
    ``B = V^T F^-1``. The leading rows of the answer span what the answer at a smaller rank spans.
    """
    return VariableProjection(problem, "rows", ridge=ridge).start(rank, 0)[0]


def curve(
    problem: Problem, ranks: Sequence[int] | None = None, *, iterations: int = 0, solved: int = 5, ridge: float = RIDGE
) -> list[CurvePoint]:
    """Errors and cost at several ranks from one spectrum.

    Args:
        ranks: ranks to report; None picks a geometric grid up to where the shared form stops saving parameters.
        iterations: when positive, solve at ``solved`` of the ranks with so many and correct the other points by the interpolated
            log ratio.

    Returns:
        Points in order of rank.
    """
    problem = problem.working()
    limit = max_rank(problem)
    members, rows, columns = problem.weights.shape
    if ranks is None:
        ranks = default_ranks(max(1, min(limit, members * rows * columns // (columns + members * rows))))
    ranks = sorted({min(limit, max(1, int(r))) for r in ranks})
    work = VariableProjection(problem, "rows", ridge=ridge)
    filters, none = work.start(ranks[-1], 0)
    table = nested_errors(problem, filters, ridge)
    points = [CurvePoint(r, cost(r, members, rows, columns), table[:, r - 1]) for r in ranks]
    if not iterations or members == 1:
        return points

    def exact(rank: int) -> Tensor:
        basis, _, _ = refine(work, filters[:rank], none, iterations=iterations, tol=TOLERANCE)
        return work.errors(basis, none)

    return correct_curve(points, exact, solved)


def solve(
    problem: Problem, rank: int, init: Tensor | None = None, *, unique: int = 0, iterations: int = 30, **how: float
) -> BasisSolution:
    """Fits ``W_k ~ C_k [U_k; B]`` under the data norm.

    Args:
        rank: shared filters R, 1 .. min(N, K * O).
        init: starting filters (R, N); None takes the one-shot spectrum.
        unique: own filters U per layer.
        iterations: of :func:`sharefold.solvers.filter_descent.refine`; with 0 the start is kept, and the coefficients are fitted.
        how: its ``tol``, and ``ridge``, the floor of the moments, relative to their mean diagonal.

    Returns:
        A solution in the dtype of ``problem.weights``; errors are measured without the ridge.

    Raises:
        SharefoldError: the rank or the number of own filters does not fit the group.
    """
    limit, most = max_rank(problem), min(problem.rows, problem.columns)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"basis: rank {rank}: this group allows 1 to {limit}")
    if not 0 <= unique <= most:
        raise SharefoldError(f"basis: {unique} own filters: these layers allow 0 to {most}")
    if init is not None and init.shape != (rank, problem.columns):
        raise SharefoldError(f"basis: init has shape {tuple(init.shape)}: expected ({rank}, {problem.columns})")
    dtype, start = problem.weights.dtype, None if init is None else orthonormal(init)
    how = {"tol": TOLERANCE, **how}
    work, basis, own, history = fitted(problem, (rank, unique), iterations=iterations, init=start, kind="rows", **how)
    coefficients = work.coefficients(basis, own)
    errors = work.problem.errors(coefficients @ work.stack(basis, own))
    return BasisSolution(
        basis.to(dtype), coefficients.to(dtype), errors.to(dtype), history, own.to(dtype) if unique else None
    )  # fmt: skip
