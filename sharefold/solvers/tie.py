"""One kernel for a whole group, ``W_k ~ diag(s_k) W``.

Sharing whole kernels is the form of ShaResNet (arXiv 1702.08782) and LruNet; averaging under the input statistics
is RegMean (arXiv 2212.09849), here with output weights and per-channel scales.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.data_norm import RIDGE, Problem, eigen_psd, moment_floors


@dataclass
class TieSolution:
    """``W_k ~ scale_k[:, None] * weight``.

    Attributes:
        weight: the shared matrix (O, N).
        scale: per-layer, per-channel scales (K, O), or None for all ones.
        errors: relative data-norm errors (K,).
        history: the objective at the start and after every step; non-increasing.
    """

    weight: Tensor
    scale: Tensor | None
    errors: Tensor
    history: list[float] = field(default_factory=list)

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        if self.scale is None:
            return self.weight.expand(self.errors.shape[0], *self.weight.shape)
        return self.scale.unsqueeze(2) * self.weight


def cost(members: int, rows: int, columns: int, scale: bool = True) -> int:
    """Parameters of the shared matrix and the scales of the group."""
    return rows * columns + members * rows * int(scale)


class RowSolver:
    """Solves ``sum_k a_kr x_r S_k = b_r`` for rows ``x_r``, each row with its own mixture of the moments.

    One eigenbasis of the mean moment preconditions all rows. Moments are floored by ``ridge`` times their mean
    diagonal, in the operator only; callers add it to right-hand sides with :meth:`times_moment`.
    """

    def __init__(self, problem: Problem, ridge: float = RIDGE) -> None:
        self.moments = problem.second
        self.ridge = moment_floors(problem, ridge)
        factors = problem.objective_weights
        mean = torch.tensordot(factors, self.moments, dims=1)
        mean.diagonal().add_((factors * self.ridge).sum())
        self.values, self.vectors = eigen_psd(mean)
        # Diagonals of every moment in the common eigenbasis: the preconditioner then fits each row's own mixture.
        rotated = [((moment @ self.vectors) * self.vectors).sum(dim=0) for moment in self.moments]
        self.diagonals = torch.stack(rotated).clamp_min(0) + self.ridge[:, None]

    def times_moment(self, matrices: Tensor) -> Tensor:
        """Matrices (K, R, N) or (R, N) times the floored moments, (K, R, N)."""
        return matrices @ self.moments + self.ridge[:, None, None] * matrices

    def solve(self, mixture: Tensor, rhs: Tensor, start: Tensor, steps: int = 40, tol: float = 1e-8) -> Tensor:
        """Rows (R, N) for a mixture (K, R) and right-hand sides (R, N); rows without any weight keep ``start``."""
        scale = mixture.T @ self.diagonals
        idle = mixture.sum(dim=0) <= 0
        # Clustered rows draw on few of the layers each, and some layers serve none.
        active = [weight.nonzero().flatten() for weight in mixture]
        every = zip(mixture, self.moments, self.ridge, active, strict=True)
        parts = [(weight[used, None], moment, ridge, used) for weight, moment, ridge, used in every if len(used)]
        scale = torch.where(idle[:, None], torch.ones_like(scale), scale)

        def apply(rows: Tensor) -> Tensor:
            total = torch.zeros_like(rows)
            for weight, moment, ridge, used in parts:
                weighted = weight * (rows if len(used) == len(rows) else rows[used])
                total.index_add_(0, used, weighted @ moment + ridge * weighted)
            return total

        def precondition(residual: Tensor) -> Tensor:
            return ((residual @ self.vectors) / scale) @ self.vectors.T

        return conjugate_gradient(LinearSystem(apply, rhs, precondition, 1), start, steps=steps, tol=tol)


def best_scales(target_image: Tensor, rows: Tensor, rows_image: Tensor, default: Tensor) -> Tensor:
    """Scales (K, O) that minimise ``|| w - s r ||_S`` per row, given ``w S`` and ``r S``; ``default`` where r = 0."""
    norm = (rows_image * rows).sum(dim=-1)
    product = (target_image * rows).sum(dim=-1)
    safe = norm > torch.finfo(norm.dtype).tiny
    return torch.where(safe, product / torch.where(safe, norm, torch.ones_like(norm)), default)


def _leading_rows(problem: Problem, solver: RowSolver) -> Tensor:
    """Per output channel the leading singular direction of the group's rows, (O, N), under the mean moment."""
    weight = (problem.objective_weights[:, None] * problem.row_metric).sqrt().unsqueeze(2)
    rows = (weight * problem.weights).transpose(0, 1)
    white = (rows @ solver.vectors) * solver.values.sqrt()
    _, _, right = torch.linalg.svd(white, full_matrices=False)
    return (right[:, 0] / solver.values.sqrt()) @ solver.vectors.T


def solve(
    problem: Problem,
    how: str = "data",
    scale: bool = True,
    *,
    rounds: int = 10,
    tol: float = 1e-5,
    ridge: float = RIDGE,
) -> TieSolution:
    """Fit one matrix to all layers of a group.

    Args:
        how: "mean" averages the matrices (scales, if any, are still fitted); "data" minimises the data-norm error.
        scale: fit a scale per layer and output channel.
        rounds: most alternations.
        tol: stop when a round lowers the objective by less than this fraction.
        ridge: floor of the moments, relative to their mean diagonal.

    Returns:
        A solution in the dtype of ``problem.weights``; errors are measured without the ridge.

    Raises:
        SharefoldError: an unknown ``how``.
    """
    if how not in ("mean", "data"):
        raise SharefoldError(f"tie: how={how!r}: expected 'mean' or 'data'")
    dtype = problem.weights.dtype
    problem = problem.working()
    members, rows, _ = problem.weights.shape
    solver = RowSolver(problem, ridge)
    factors = problem.objective_weights[:, None] * problem.row_metric
    target_image = solver.times_moment(problem.weights)
    ones = problem.weights.new_ones(members, rows)

    def per_row(weight: Tensor, scales: Tensor) -> Tensor:
        gap = problem.weights - scales.unsqueeze(2) * weight
        return (factors * (gap * solver.times_moment(gap)).sum(dim=2)).sum(dim=0)

    def fit_rows(weight: Tensor, scales: Tensor) -> Tensor:
        rhs = ((factors * scales).unsqueeze(2) * target_image).sum(dim=0)
        return solver.solve(factors * scales.square(), rhs, weight)

    def fit_scales(weight: Tensor, scales: Tensor) -> Tensor:
        return best_scales(target_image, weight, solver.times_moment(weight), scales)

    weight = problem.weights.mean(dim=0)
    scales = ones
    if how == "data":
        weight = fit_rows(weight, scales)
    if scale:
        scales = fit_scales(weight, scales)
        if how == "data":
            # Layers may share a direction with opposite signs, which no start with equal scales can see.
            other = _leading_rows(problem, solver)
            other_scales = fit_scales(other, ones)
            better = per_row(other, other_scales) < per_row(weight, scales)
            weight = torch.where(better[:, None], other, weight)
            scales = torch.where(better, other_scales, scales)
    history = [float(per_row(weight, scales).sum())]
    for _ in range(rounds if scale and how == "data" else 0):
        before = (weight, scales)
        weight = fit_rows(weight, scales)
        scales = fit_scales(weight, scales)
        value = float(per_row(weight, scales).sum())
        if not value <= history[-1]:
            weight, scales = before
            break
        history.append(value)
        if history[-2] - value <= tol * history[-2]:
            break
    if scale and how == "data":
        # The split between matrix and scales is free; mean scale 1 keeps both at their usual size.
        size = scales.mean(dim=0)
        size = torch.where(size.abs() > 1e-3 * scales.abs().amax(dim=0).clamp_min(1e-30), size, torch.ones_like(size))
        weight, scales = weight * size[:, None], scales / size
    errors = problem.errors(scales.unsqueeze(2) * weight)
    return TieSolution(weight.to(dtype), scales.to(dtype) if scale else None, errors.to(dtype), history)
