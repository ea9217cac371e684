"""Shared filter basis: every layer of a group is its own mix of common filters, ``W_k ~ C_k B``.

The form is that of Deeply Shared Filter Bases (NeurIPS 2021, arXiv 2006.05066), optionally with a few filters of
its own for every layer, ``W_k ~ C_k [U_k; B]``. Here it is fitted to trained weights: alternating least squares
under the data norm, started from the whitened singular vectors of the stacked layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.options import chosen
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.curves import CurvePoint, correct_curve, default_ranks, nested_errors
from sharefold.solvers.data_norm import RIDGE, Problem, eigen_psd, moment_floors, solve_psd
from sharefold.solvers.directions import leading_whitened, orthonormal
from sharefold.solvers.low_rank import whitened_factors
from sharefold.solvers.solve_options import SolveOptions

CHUNK_BYTES = 256 * 2**20
STRETCHES = (2.0, 4.0, 8.0)
STRETCH_BYTES = 2**30


@dataclass(frozen=True)
class BasisOptions(SolveOptions):
    """With ``rounds=0`` the starting basis is kept and the coefficients are fitted.

    Attributes:
        cg_steps: conjugate-gradient steps of every basis update.
    """

    rounds: int = 12
    tol: float = 5e-4
    cg_steps: int = 3


@dataclass
class BasisSolution:
    """``W_k ~ coefficients_k @ [unique_k; basis]``.

    Attributes:
        basis: (R, N), orthonormal rows.
        coefficients: (K, O, U + R), the columns of a layer's own filters first.
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed) at the start and after every round; non-increasing.
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
        return self.coefficients @ stack_filters(self.basis, self.unique, self.coefficients.shape[0])


def stack_filters(basis: Tensor, unique: Tensor | None, members: int) -> Tensor:
    """``[U_k; B]`` (K, U + R, N)."""
    shared = basis.expand(members, *basis.shape)
    return shared if unique is None else torch.cat([unique, shared], dim=1)


def cost(rank: int, members: int, rows: int, columns: int, unique: int = 0) -> int:
    """Parameters of a group of ``members`` layers: shared filters, own filters and coefficients."""
    return rank * columns + members * (unique * columns + rows * (rank + unique))


def max_rank(problem: Problem) -> int:
    """Ranks above this change nothing: the stacked layers span no more."""
    return min(problem.columns, problem.members * problem.rows)


class _Workspace:
    """Quantities of a problem that every round needs: floored moments, products, eigenbases."""

    def __init__(self, problem: Problem, ridge: float) -> None:
        self.problem = problem
        self.factors = problem.objective_weights
        self.ridge = moment_floors(problem, ridge)
        self.target = problem.weighted + self.ridge[:, None, None] * problem.weights
        self.energy = self.factors * (problem.apply_left(problem.weights) * self.target).sum(dim=(1, 2))
        self._mean_eigen: tuple[Tensor, Tensor] | None = None

    def mean_moment(self) -> Tensor:
        """Mean moment weighted by the layers' factors, floored (N, N)."""
        columns = self.problem.columns
        mean = torch.tensordot(self.factors, self.problem.second, dims=1)
        ridge = (self.factors * self.ridge).sum()
        if float(self.factors.sum()) == 0:
            return torch.eye(columns, dtype=mean.dtype, device=mean.device)
        return mean + ridge * torch.eye(columns, dtype=mean.dtype, device=mean.device)

    @property
    def mean_eigen(self) -> tuple[Tensor, Tensor]:
        if self._mean_eigen is None:
            self._mean_eigen = eigen_psd(self.mean_moment())
        return self._mean_eigen

    def times_moments(self, rows: Tensor) -> Tensor:
        """(R, N) or (K, R, N) times every floored moment: (K, R, N)."""
        return rows @ self.problem.second + self.ridge[:, None, None] * rows

    def gram_sum(self, grams: Tensor, rows: Tensor) -> Tensor:
        """``sum_k grams_k rows S_k`` (R, N), in chunks of layers so that memory stays bounded."""
        size, columns = rows.shape
        step = max(1, CHUNK_BYTES // max(1, rows.element_size() * size * columns))
        total = torch.zeros_like(rows)
        for first in range(0, grams.shape[0], step):
            part = slice(first, first + step)
            image = rows @ self.problem.second[part] + self.ridge[part, None, None] * rows
            total += _gram_times(grams[part], image)
        return total


def _gram_times(grams: Tensor, image: Tensor) -> Tensor:
    """``sum_k grams_k image_k`` (R, N) of (K, R, R) and (K, R, N), as one matrix product."""
    size, columns = image.shape[1:]
    return grams.transpose(0, 1).reshape(size, -1) @ image.reshape(-1, columns)


def _objective(work: _Workspace, coefficients: Tensor, cross: Tensor, gram: Tensor) -> float:
    """Weighted squared error from the products the rounds have at hand.

    ``cross`` is ``W_k S_k F_k^T`` (K, O, R) and ``gram`` is ``F_k S_k F_k^T`` (K, R, R).
    """
    left = work.problem.apply_left(coefficients)
    explained = 2 * (left * cross).sum(dim=(1, 2)) - (left * (coefficients @ gram)).sum(dim=(1, 2))
    return max(0.0, float((work.energy - work.factors * explained).sum()))


def _coefficient_step(
    work: _Workspace, filters: Tensor, image: Tensor, previous: Tensor | None
) -> tuple[Tensor, float]:
    """Best coefficients for given filters (K, R, N) with ``image`` their product with the moments; and the objective.

    The ridge pulls towards the previous coefficients, which keeps the step from ever raising the objective.
    """
    gram = image @ filters.transpose(1, 2)
    cross = work.target @ filters.transpose(1, 2)
    size = gram.shape[-1]
    tiny = 1e-12 if gram.dtype == torch.float64 else 1e-7
    pull = tiny * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    rhs = cross if previous is None else cross + pull * previous
    shifted = gram + pull * torch.eye(size, dtype=gram.dtype, device=gram.device)
    coefficients = solve_psd(shifted, rhs.transpose(1, 2)).transpose(1, 2)
    return coefficients, _objective(work, coefficients, cross, gram)


def _basis_step(
    work: _Workspace, basis: Tensor, image: Tensor, coefficients: Tensor, offset: Tensor | None, steps: int
) -> Tensor:
    """Lower the objective in the shared filters (R, N) by preconditioned conjugate gradients.

    ``image`` (K, R, N) is their product with the moments, ``offset`` (K, O, N) what a layer's own filters contribute.
    """
    left = work.problem.apply_left(coefficients) * work.factors[:, None, None]
    grams = left.transpose(1, 2) @ coefficients
    target = work.target if offset is None else work.target - work.times_moments(offset)
    rhs = torch.einsum("kor,kon->rn", left, target)
    values, right = work.mean_eigen
    left_values, left_vectors = eigen_psd(grams.sum(dim=0))
    scale = left_values[:, None] * (values / work.factors.sum().clamp_min(torch.finfo(values.dtype).tiny))[None, :]

    def precondition(residual: Tensor) -> Tensor:
        return left_vectors @ ((left_vectors.T @ residual @ right) / scale) @ right.T

    system = LinearSystem(partial(work.gram_sum, grams), rhs, precondition)
    return conjugate_gradient(system, basis, steps=steps, tol=1e-7, start_image=_gram_times(grams, image))


def _unique_step(work: _Workspace, residual: Tensor, count: int) -> Tensor:
    """Best own filters (K, U, N) for the residuals (K, O, N): a truncated whitened SVD per layer."""
    image = work.times_moments(residual)
    return whitened_factors(residual, image, work.problem, count)[1]


def spectrum(problem: Problem, rank: int, ridge: float = RIDGE) -> Tensor:
    """One-shot basis: ordered filters (rank, N) from the whitened SVD of the stacked layers.

    With S the mean moment and ``S = F F^T``, the right singular vectors V of the stacked
    ``sqrt(w_k) D_k W_k F`` give ``B = V^T F^-1``. The leading rows of the answer are the answer at a smaller rank.
    """
    return _spectrum(_Workspace(problem.working(), ridge), rank)


def _spectrum(work: _Workspace, rank: int) -> Tensor:
    problem = work.problem
    values, vectors = work.mean_eigen
    metric = problem.apply_left(problem.weights) * work.factors[:, None, None]
    stacked = torch.einsum("kon,kom->nm", metric, problem.weights)
    return leading_whitened(stacked, values, vectors, rank).T @ vectors.T


def curve(
    problem: Problem,
    ranks: Sequence[int] | None = None,
    *,
    als_rounds: int = 0,
    als_ranks: int = 5,
    unique: int = 0,
    ridge: float = RIDGE,
) -> list[CurvePoint]:
    """Errors and cost at several ranks from one spectrum.

    Args:
        ranks: ranks to report; None picks a geometric grid up to where the shared form stops saving parameters.
        als_rounds: when positive, solve at ``als_ranks`` of the ranks with that many rounds and correct the other
            points by the interpolated log ratio.
        unique: own filters per layer; every such point is solved (there is no nested spectrum for them).

    Returns:
        Points in order of rank.
    """
    problem = problem.working()
    limit = max_rank(problem)
    members, rows, columns = problem.weights.shape
    if ranks is None:
        full = members * rows * columns
        top = (full - members * unique * (rows + columns)) // (columns + members * rows)
        ranks = default_ranks(max(1, min(limit, top)))
    ranks = sorted({min(limit, max(1, int(r))) for r in ranks})
    costs = [cost(r, members, rows, columns, unique) for r in ranks]
    if unique:
        rounds = max(1, als_rounds)
        errors = [solve(problem, r, rounds=rounds, unique=unique, ridge=ridge).errors for r in ranks]
        return [CurvePoint(r, c, e) for r, c, e in zip(ranks, costs, errors, strict=True)]
    filters = spectrum(problem, ranks[-1], ridge)
    table = nested_errors(problem, orthonormal(filters), ridge)
    points = [CurvePoint(r, c, table[:, r - 1]) for r, c in zip(ranks, costs, strict=True)]
    if als_rounds and members > 1:
        points = correct_curve(
            points,
            lambda rank: solve(problem, rank, rounds=als_rounds, init=filters[:rank], ridge=ridge).errors,
            als_ranks,
        )
    return points


def solve(
    problem: Problem,
    rank: int,
    init: Tensor | None = None,
    *,
    unique: int = 0,
    options: BasisOptions | None = None,
    **settings: Any,
) -> BasisSolution:
    """Fit ``W_k ~ C_k [U_k; B]`` by alternating least squares under the data norm.

    Args:
        rank: shared filters R, 1 .. min(N, K * O).
        init: starting filters (R, N); None takes the one-shot spectrum.
        unique: own filters U per layer.
        options, settings: a record, or its fields by keyword.

    Returns:
        A solution in the dtype of ``problem.weights``; errors are measured without the ridge.

    Raises:
        SharefoldError: the rank or the number of own filters does not fit the group.
    """
    options = chosen(options, settings, BasisOptions)
    limit = max_rank(problem)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"basis: rank {rank}: this group allows 1 to {limit}")
    if not 0 <= unique <= min(problem.rows, problem.columns):
        raise SharefoldError(
            f"basis: {unique} own filters: these layers allow 0 to {min(problem.rows, problem.columns)}"
        )
    dtype = problem.weights.dtype
    exact = problem.working()
    work = _Workspace(exact, options.ridge)
    basis = _spectrum(work, rank) if init is None else init.to(exact.weights)
    if basis.shape != (rank, exact.columns):
        raise SharefoldError(f"basis: init has shape {tuple(basis.shape)}: expected ({rank}, {exact.columns})")
    basis = orthonormal(basis)
    own: Tensor | None = None
    own_image: Tensor | None = None
    members = exact.members
    image = work.times_moments(basis)

    def fit(rows: Tensor, rows_image: Tensor, previous: Tensor | None) -> tuple[Tensor, float]:
        joint = rows_image if own_image is None else torch.cat([own_image, rows_image], dim=1)
        return _coefficient_step(work, stack_filters(rows, own, members), joint, previous)

    coefficients, value = fit(basis, image, None)
    history: list[float] = [] if unique else [value]
    for step in range(max(options.rounds, 1 if unique else 0)):
        offset = None
        if unique:
            shared = coefficients[..., -rank:]
            own = orthonormal(_unique_step(work, exact.weights - shared @ basis, unique))
            own_image = work.times_moments(own)
            coefficients, value = fit(basis, image, None)
            offset = coefficients[..., :unique] @ own
            if step == 0:
                history.append(value)
                if options.rounds == 0:
                    break
        previous = (basis, coefficients)
        moved = _basis_step(work, basis, image, coefficients[..., -rank:], offset, options.cg_steps)
        moved_image = work.times_moments(moved)
        coefficients, value = fit(moved, moved_image, coefficients)
        best, best_image = moved, moved_image
        # The alternation crawls along valleys; longer steps in its direction cost no product with the moments.
        for stretch in STRETCHES if moved_image.numel() * moved_image.element_size() <= STRETCH_BYTES else ():
            trial = basis + stretch * (moved - basis)
            trial_image = image + stretch * (moved_image - image)
            trial_coefficients, trial_value = fit(trial, trial_image, coefficients)
            if not trial_value < value:
                break
            best, best_image, coefficients, value = trial, trial_image, trial_coefficients, trial_value
        if not math.isfinite(value) or value > history[-1]:
            # Rounding has eaten the gain (float32 at a nearly exact fit): keep the better point.
            basis, coefficients = previous
            break
        factored = torch.linalg.qr(best.T)
        basis = factored.Q.T
        image = torch.linalg.solve_triangular(factored.R.T, best_image, upper=False)
        coefficients = torch.cat([coefficients[..., :unique], coefficients[..., -rank:] @ factored.R.T], dim=2)
        history.append(value)
        if history[-2] - value <= options.tol * history[-2]:
            break
    errors = exact.errors(coefficients @ stack_filters(basis, own, members))
    return BasisSolution(
        basis.to(dtype),
        coefficients.to(dtype),
        errors.to(dtype),
        history,
        None if own is None else own.to(dtype),
    )
