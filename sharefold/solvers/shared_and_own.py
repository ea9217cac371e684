"""Hybrid: filters that a group shares and filters of every layer's own, ``W_k ~ C_k [own_k; B]``, fitted together.

Own filters are vertical ones in every column of the kernel (those of a spatial SVD: Jaderberg et al.,
https://arxiv.org/abs/1405.3866) or whole ones (those of an SVD). Both parts are found by
:mod:`sharefold.solvers.variable_projection`, from each layer's own leading filters and the leading shared ones of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.data_norm import RIDGE, Problem
from sharefold.solvers.directions import orthonormal
from sharefold.solvers.filter_descent import fitted, refine
from sharefold.solvers.variable_projection import Kind, VariableProjection


@dataclass
class HybridSolution:
    """``W_e ~ coefficients_e @ [own; basis]`` for every entry e of the problem; see :meth:`VariableProjection.stack`.

    Attributes:
        basis: (R, N), orthonormal rows.
        own: (L, r, J), orthonormal rows: of every layer, J = I * h for vertical filters, N for whole ones.
        coefficients: (E, O, M), own filters first; M = r * w + R for vertical filters (r-th filter in column b: r * w + b),
            else r + R.
        errors: relative data-norm errors (E,).
        history: the objective at the start and after every iteration; it never rises.
    """

    basis: Tensor
    own: Tensor
    coefficients: Tensor
    errors: Tensor
    history: list[float] = field(default_factory=list)


def solve(
    problem: Problem, rank: int, own: int, *, iterations: int = 60, tol: float = 2e-4, **how: Any
) -> HybridSolution:
    """Fits ``rank`` shared and ``own`` own filters to all entries together.

    Args:
        iterations, tol: of :func:`sharefold.solvers.filter_descent.refine`.
        how: which own filters there are; see :class:`sharefold.solvers.variable_projection.VariableProjection`.

    Returns:
        A solution in the dtype of the problem's weights; errors are measured without the ridge.

    Raises:
        SharefoldError: the numbers do not fit the group.
    """
    dtype, columns = problem.weights.dtype, problem.columns
    most = columns // (problem.kernel[1] if how.get("kind", "columns") == "columns" else 1)
    if not (1 <= rank <= columns and 0 <= own <= most):
        raise SharefoldError(f"hybrid: {rank} shared and {own} own filters: this group allows 1 to {columns} and 0 to {most}")
    work, basis, private, history = fitted(problem, (rank, own), iterations=iterations, tol=tol, **how)
    coefficients = work.coefficients(basis, private)
    errors = work.problem.errors(coefficients @ work.stack(basis, private))
    return HybridSolution(basis.to(dtype), private.to(dtype), coefficients.to(dtype), errors.to(dtype), history)


def curve(work: VariableProjection, sizes: Sequence[tuple[int, int]], iterations: Sequence[int]) -> list[Tensor]:
    """Relative errors (E,) at every (shared, own) number of filters, after so few ``iterations`` each."""
    found = []
    for (rank, own), few in zip(sizes, iterations, strict=True):
        basis, private, _ = refine(work, *work.start(rank, own), iterations=few, tol=1e-3)
        found.append(work.errors(basis, private))
    return found


def solve_own(
    problem: Problem, basis: Tensor, own: Tensor, kind: Kind = "columns", *, iterations: int = 40, ridge: float = RIDGE
) -> HybridSolution:
    """Own filters and coefficients for shared filters (R, N) that stay as they are, from own filters (L, r, J) on."""
    dtype = problem.weights.dtype
    work = VariableProjection(problem, kind, ridge=ridge)
    basis, own = basis.to(work.problem.weights), orthonormal(own.to(work.problem.weights))
    _, own, history = refine(work, basis, own, iterations=iterations, tol=1e-3, fixed=True)
    coefficients = work.coefficients(basis, own)
    errors = work.problem.errors(coefficients @ work.stack(basis, own))
    return HybridSolution(basis.to(dtype), own.to(dtype), coefficients.to(dtype), errors.to(dtype), history)
