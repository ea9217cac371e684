"""Shared filter basis inside a shared input space, ``W_k ~ C_k B kron(A, I_hw)``.

The input channels of the whole group first pass one common projection ``A`` (J x I); the common filters ``B`` live
in the J reduced channels. This is Tucker-2 (Kim et al., arXiv 1511.06530, who decompose every layer on its own)
with input factor and core shared by the group. Given ``A``, the fit is a filter basis under projected moments.

On trained networks it beats the plain filter basis at equal size for small budgets and small groups, and loses to
it for large ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.options import chosen
from sharefold.solvers import shared_basis as filter_basis
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.curves import CurvePoint, correct_curve
from sharefold.solvers.data_norm import RIDGE, Problem, eigen_psd, moment_floors, solve_psd
from sharefold.solvers.directions import leading
from sharefold.solvers.solve_options import SolveOptions

WIDTHS = (0.85, 0.7, 0.5, 0.35)


@dataclass(frozen=True)
class TuckerOptions(SolveOptions):
    """At least one round is done.

    Attributes:
        inner_iterations: of the filter basis in each alternation.
        cg_steps: conjugate-gradient steps of every update.
    """

    rounds: int = 8
    inner_iterations: int = 4
    cg_steps: int = 3


@dataclass
class TuckerSolution:
    """``W_k ~ coefficients_k @ basis @ kron(projection, I_hw)``.

    Attributes:
        projection: (J, I), orthonormal rows; a 1x1 convolution.
        basis: (R, J * h * w).
        coefficients: (K, O, R).
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed) after every round; non-increasing.
    """

    projection: Tensor
    basis: Tensor
    coefficients: Tensor
    errors: Tensor
    history: list[float] = field(default_factory=list)

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        return self.coefficients @ lift(self.basis, self.projection)


@dataclass
class TuckerPoint(CurvePoint):
    """A curve point that also names the width J of the input space."""

    width: int


def lift(matrices: Tensor, projection: Tensor) -> Tensor:
    """Matrices (..., J * h * w) on projected channels as matrices (..., I * h * w) on the layers' own."""
    split = matrices.reshape(*matrices.shape[:-1], projection.shape[0], -1)
    return torch.einsum("...jt,ji->...it", split, projection).flatten(-2)


def cost(rank: int, width: int, members: int, rows: int, columns: int, taps: int) -> int:
    """Parameters of the group: projection, shared filters and coefficients."""
    return width * (columns // taps) + rank * width * taps + members * rows * rank


class _Tucker:
    def __init__(self, problem: Problem, ridge: float) -> None:
        problem = problem.working()
        self.original = problem
        floors = moment_floors(problem, ridge)
        moments = problem.second.clone(memory_format=torch.contiguous_format)
        moments.diagonal(dim1=1, dim2=2).add_(floors[:, None])
        self.factors = problem.objective_weights
        # Orthonormal projections keep the floor of the moments, so it is added once, here.
        self.problem = Problem(problem.weights, moments, problem.row_weights, problem.kernel, self.factors)
        self.taps = problem.taps
        self.members, self.rows, columns = problem.weights.shape
        self.inputs = columns // self.taps
        blocks = self.problem.second.reshape(self.members, self.inputs, self.taps, self.inputs, self.taps)
        marginal = blocks.diagonal(dim1=2, dim2=4).mean(dim=-1)
        self.values, self.vectors = eigen_psd(torch.tensordot(self.factors, marginal, dims=1))

    def split(self, matrices: Tensor) -> Tensor:
        return matrices.reshape(self.members, self.rows, -1, self.taps)

    def start(self, width: int) -> Tensor:
        """Leading input channels directions of the stacked layers, whitened by the channels' moments; (J, I)."""
        weighted = self.problem.apply_left(self.problem.weights) * self.factors[:, None, None]
        gram = torch.einsum("koit,kojt->ij", self.split(weighted), self.split(self.problem.weights))
        return leading(gram, self.values, self.vectors, width)

    def reduced(self, projection: Tensor) -> Problem:
        """The filter-basis problem in the projected channels; its errors miss what the projection lost."""
        width = projection.shape[0] * self.taps
        columns = self.problem.columns
        inner = lift(torch.eye(width, dtype=projection.dtype, device=projection.device), projection)
        moments = inner @ (self.problem.second @ inner.T).reshape(self.members, columns, width)
        target = self.problem.weighted @ inner.T
        weights = solve_psd(moments, target.transpose(1, 2)).transpose(1, 2)
        return Problem(weights, moments, self.problem.row_weights, self.problem.kernel, self.factors)

    def fit_projection(self, basis: Tensor, coefficients: Tensor, projection: Tensor, steps: int) -> Tensor:
        filters = coefficients @ basis
        mixed = self.split(filters)
        weighted = self.split(self.problem.apply_left(filters) * self.factors[:, None, None])

        def adjoint(image: Tensor) -> Tensor:
            return torch.einsum("kojt,koit->ji", weighted, self.split(image))

        left_values, left = eigen_psd(torch.einsum("kojt,kolt->jl", weighted, mixed))
        scale = left_values[:, None] * self.values

        def precondition(residual: Tensor) -> Tensor:
            return left @ ((left.T @ residual @ self.vectors) / scale) @ self.vectors.T

        def apply(rows: Tensor) -> Tensor:
            return adjoint(lift(filters, rows) @ self.problem.second)

        system = LinearSystem(apply, adjoint(self.problem.weighted), precondition)
        return conjugate_gradient(system, projection, steps=steps)


def _check(problem: Problem, rank: int, width: int) -> None:
    inputs = problem.columns // problem.taps
    if not 1 <= width <= inputs:
        raise SharefoldError(f"tucker: width {width}: these layers allow 1 to {inputs}")
    limit = min(width * problem.taps, problem.members * problem.rows)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"tucker: rank {rank} at width {width}: this group allows 1 to {limit}")


def solve(
    problem: Problem, rank: int, width: int, options: TuckerOptions | None = None, **settings: Any
) -> TuckerSolution:
    """Fit the form by alternating least squares under the data norm.

    Args:
        rank: shared filters R, 1 .. min(J * h * w, K * O).
        width: projected channels J, 1 .. I.
        options, settings: a record, or its fields by keyword.

    Returns:
        A solution in the dtype of ``problem.weights``; errors are measured without the ridge.

    Raises:
        SharefoldError: rank or width do not fit the group.
    """
    options = chosen(options, settings, TuckerOptions)
    _check(problem, rank, width)
    dtype = problem.weights.dtype
    work = _Tucker(problem, options.ridge)
    projection = work.start(width)
    basis: Tensor | None = None
    history: list[float] = []
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(max(1, options.rounds)):
        fit = filter_basis.solve(
            work.reduced(projection), rank, basis, iterations=options.inner_iterations, tol=0.0, ridge=0.0
        )
        moved = work.fit_projection(fit.basis, fit.coefficients, projection, options.cg_steps)
        factored = torch.linalg.qr(moved.T)
        projection = factored.Q.T
        basis = torch.einsum("rjt,lj->rlt", fit.basis.reshape(rank, width, -1), factored.R).flatten(1)
        value = work.problem.error_sum(fit.coefficients @ lift(basis, projection))
        if history and not value <= history[-1]:
            break
        best = (projection, basis, fit.coefficients)
        history.append(value)
        if len(history) > 1 and history[-2] - value <= options.tol * history[-2]:
            break
    assert best is not None
    projection, basis, coefficients = best
    errors = work.original.errors(coefficients @ lift(basis, projection))
    return TuckerSolution(projection.to(dtype), basis.to(dtype), coefficients.to(dtype), errors.to(dtype), history)


def _solved_errors(problem: Problem, rank: int, width: int, rounds: int, ridge: float) -> Tensor:
    return solve(problem, rank, width, rounds=rounds, ridge=ridge).errors


def curve(
    problem: Problem,
    widths: Sequence[int] | None = None,
    ranks: Sequence[int] | None = None,
    *,
    als_rounds: int = 0,
    als_ranks: int = 3,
    ridge: float = RIDGE,
) -> list[TuckerPoint]:
    """Cost and errors over widths and ranks; only points that no cheaper one beats are returned, by rising cost.

    Args:
        widths: projected channels J to try; None tries a few fractions of I.
        ranks: ranks to try at every width (clipped to what it allows); None takes a geometric grid.
        als_rounds: when positive, correct every width's curve by solving at ``als_ranks`` of its ranks.
    """
    work = _Tucker(problem, ridge)
    exact, taps = work.problem, work.taps
    members, rows, columns = exact.weights.shape
    if widths is None:
        widths = [max(1, round(share * work.inputs)) for share in WIDTHS]
    energy = exact.energy.clamp_min(torch.finfo(exact.energy.dtype).tiny)
    points: list[TuckerPoint] = []
    for width in sorted(set(widths)):
        _check(exact, 1, width)
        small = work.reduced(work.start(width))
        lost = (exact.energy - small.energy).clamp_min(0)
        one_shot = [
            CurvePoint(
                point.rank,
                cost(point.rank, width, members, rows, columns, taps),
                (lost + small.energy * point.errors) / energy,
            )
            for point in filter_basis.curve(small, ranks, ridge=0.0)
        ]
        if als_rounds:
            solved = partial(_solved_errors, problem, width=width, rounds=als_rounds, ridge=ridge)
            one_shot = correct_curve(one_shot, solved, als_ranks)
        points += [TuckerPoint(p.rank, p.cost, p.errors, width) for p in one_shot]
    points.sort(key=lambda p: (p.cost, float(p.errors.sum())))
    frontier: list[TuckerPoint] = []
    for point in points:
        if not frontier or float(point.errors.sum()) < float(frontier[-1].errors.sum()):
            frontier.append(point)
    return frontier
