"""Per-layer factorisations under the data norm: truncated SVD and separable (h x 1, then 1 x w) kernels.

SVD, ``W_k ~ C_k V_k``: the optimum projects the outputs. With ``P`` the leading eigenvectors of ``D W S W^T D`` the
best rank-R matrix is ``D^-1 P P^T D W``; only O x O eigenproblems, and rank-deficient moments need no care. Prior
art: SVD-LLM (arXiv 2403.07378), BALF (arXiv 2509.25136).

Spatial, ``W_k[o, i, y, x] ~ sum_r H_k[o, r, x] V_k[r, i, y]``: the form of Jaderberg et al. (arXiv 1405.3866),
here fitted by alternating least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.curves import CurvePoint, correct_curve, default_ranks, nested_errors
from sharefold.solvers.data_norm import RIDGE, Problem, eigen_psd, moment_floors, solve_psd
from sharefold.solvers.directions import leading


@dataclass
class LowRankSolution:
    """``W_k ~ left_k @ right_k``: left (K, O, R), right (K, R, N), relative errors (K,)."""

    left: Tensor
    right: Tensor
    errors: Tensor

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        return self.left @ self.right


def cost(rank: int, members: int, rows: int, columns: int) -> int:
    """Parameters of ``members`` layers factored at ``rank``."""
    return members * rank * (rows + columns)


def max_rank(problem: Problem) -> int:
    return min(problem.rows, problem.columns)


def output_roots(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output scales ``D`` and their inverses, (K, O, 1)."""
    weights = problem.row_metric
    top = weights.amax(dim=1, keepdim=True)
    # Rows that a zero BatchNorm scale silences still get a direction, only a very light one.
    root = torch.maximum(weights, 1e-12 * torch.where(top > 0, top, torch.ones_like(top))).sqrt().unsqueeze(2)
    return root, 1 / root


def _output_spectrum(matrices: Tensor, images: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    root, inverse = output_roots(problem)
    gram = (root * matrices) @ (root * images).transpose(1, 2)
    values, vectors = torch.linalg.eigh((gram + gram.transpose(1, 2)) / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1), root, inverse


def whitened_factors(matrices: Tensor, images: Tensor, problem: Problem, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors (K, O, R), (K, R, N) of ``matrices``; ``images`` is ``matrices_k @ S_k``."""
    _, vectors, root, inverse = _output_spectrum(matrices, images, problem)
    top = vectors[..., :rank]
    return inverse * top, top.transpose(1, 2) @ (root * matrices)


def svd_curve(problem: Problem, ranks: Sequence[int] | None = None) -> list[CurvePoint]:
    """Errors and cost at several ranks (the same rank in every layer), exact at all of them.

    ``ranks=None`` takes a geometric grid up to where the factored form stops saving parameters.
    """
    problem = problem.working()
    limit = max_rank(problem)
    members, rows, columns = problem.weights.shape
    if ranks is None:
        ranks = default_ranks(max(1, min(limit, rows * columns // (rows + columns))))
    values = _output_spectrum(problem.weights, problem.weighted, problem)[0]
    tails = values.flip(-1).cumsum(dim=-1).flip(-1)
    total = tails[:, :1].clamp_min(torch.finfo(values.dtype).tiny)
    relative = torch.cat([tails[:, 1:], torch.zeros_like(tails[:, :1])], dim=1) / total
    zero = relative.new_zeros(members)
    return [
        CurvePoint(r, cost(r, members, rows, columns), relative[:, r - 1] if r <= rows else zero)
        for r in sorted({min(limit, max(1, int(r))) for r in ranks})
    ]


def svd_solve(problem: Problem, rank: int) -> LowRankSolution:
    """Optimal factors of every layer at ``rank``; the rows of ``right`` are orthonormal.

    Raises:
        SharefoldError: the rank is not in 1 .. min(O, N).
    """
    limit = max_rank(problem)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"svd: rank {rank}: these layers allow 1 to {limit}")
    exact = problem.working()
    left, right = whitened_factors(exact.weights, exact.weighted, exact, rank)
    # Orthonormal rows give the two factors comparable scales for fine-tuning.
    orthonormal, triangle = torch.linalg.qr(right.transpose(1, 2))
    right = orthonormal.transpose(1, 2)
    left = left @ triangle.transpose(1, 2)
    errors = exact.errors(left @ right)
    dtype = problem.weights.dtype
    return LowRankSolution(left.to(dtype), right.to(dtype), errors.to(dtype))


@dataclass
class SpatialSolution:
    """Separable kernels of every layer.

    Attributes:
        vertical: (K, R, I, h, 1), applied first.
        horizontal: (K, O, R, 1, w), applied second.
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed); non-increasing.
    """

    vertical: Tensor
    horizontal: Tensor
    errors: Tensor
    history: list[float] = field(default_factory=list)

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, O, N)."""
        return torch.einsum("korx,kriy->koiyx", self.horizontal.squeeze(3), self.vertical.squeeze(4)).flatten(2)


def spatial_cost(rank: int, members: int, rows: int, columns: int, kernel: tuple[int, int]) -> int:
    """Parameters of ``members`` layers in separable form."""
    wide = kernel[1]
    return members * rank * (columns // wide + rows * wide)


def spatial_max_rank(problem: Problem) -> int:
    wide = problem.kernel[1]
    return min(problem.columns // wide, problem.rows * wide)


class _Spatial:
    """The two half-steps of the separable fit, all layers at once. ``V`` is (K, R, I*h), ``H`` is (K, O, R, w)."""

    def __init__(self, problem: Problem, ridge: float) -> None:
        self.problem = problem
        self.wide = problem.kernel[1]
        self.floors = moment_floors(problem, ridge)[:, None, None]
        self.target = self.image(problem.weights)
        self.factors = problem.objective_weights
        members, columns = problem.members, problem.columns // self.wide
        # Mean over the kernel's columns of the moments of one column: the metric of the vertical factor.
        blocks = problem.second.reshape(members, columns, self.wide, columns, self.wide)
        self.marginal = blocks.diagonal(dim1=2, dim2=4).mean(dim=-1)
        self.marginal = self.marginal + self.floors * torch.eye(columns, dtype=blocks.dtype, device=blocks.device)
        self.values, self.vectors = eigen_psd(self.marginal)

    def image(self, matrices: Tensor) -> Tensor:
        return matrices @ self.problem.second + self.floors * matrices

    def compose(self, horizontal: Tensor, vertical: Tensor) -> Tensor:
        return torch.einsum("korx,krj->kojx", horizontal, vertical).flatten(2)

    def objective(self, horizontal: Tensor, vertical: Tensor) -> float:
        gap = self.problem.weights - self.compose(horizontal, vertical)
        return float((self.factors * (self.problem.apply_left(gap) * self.image(gap)).sum(dim=(1, 2))).sum())

    def start(self, rank: int) -> Tensor:
        """Leading vertical filters of the unfolded (O*w) x (I*h) arrangement, orthonormal, most important first."""
        weights = self.problem.weights
        members, rows, _ = weights.shape
        split = weights.reshape(members, rows, -1, self.wide)
        left = self.problem.apply_left(weights).reshape_as(split)
        gram = torch.einsum("kojx,komx->kjm", left, split)
        return leading(gram, self.values, self.vectors, rank)

    def spread(self, vertical: Tensor) -> Tensor:
        """Matrices (K, R*w, N) that take a patch to the vertical filters' answers in every kernel column."""
        eye = torch.eye(self.wide, dtype=vertical.dtype, device=vertical.device)
        return torch.einsum("krj,xz->krxjz", vertical, eye).reshape(vertical.shape[0], -1, self.problem.columns)

    def fit_horizontal(self, vertical: Tensor, previous: Tensor | None) -> Tensor:
        spread = self.spread(vertical)
        gram = self.image(spread) @ spread.transpose(1, 2)
        cross = self.target @ spread.transpose(1, 2)
        pull = 1e-10 if gram.dtype == torch.float64 else 1e-7
        shift = pull * gram.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
        if previous is not None:
            cross = cross + shift * previous.flatten(2)
        gram = gram + shift * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        solution = solve_psd(gram, cross.transpose(1, 2)).transpose(1, 2)
        return solution.reshape(*solution.shape[:2], -1, self.wide)

    def fit_vertical(self, horizontal: Tensor, vertical: Tensor, steps: int) -> Tensor:
        weighted = self.problem.apply_left(horizontal.flatten(2)).reshape_as(horizontal)

        def adjoint(image: Tensor) -> Tensor:
            return torch.einsum("korx,kojx->krj", weighted, image.reshape(*image.shape[:2], -1, self.wide))

        gram = torch.einsum("korx,kosx->krs", weighted, horizontal)
        values, vectors = eigen_psd(gram)
        scale = values.unsqueeze(2) * self.values.unsqueeze(1)

        def precondition(residual: Tensor) -> Tensor:
            inner = vectors.transpose(1, 2) @ residual @ self.vectors
            return vectors @ (inner / scale) @ self.vectors.transpose(1, 2)

        def apply(rows: Tensor) -> Tensor:
            return adjoint(self.image(self.compose(horizontal, rows)))

        return conjugate_gradient(LinearSystem(apply, adjoint(self.target), precondition, 1), vertical, steps=steps)


def spatial_solve(
    problem: Problem,
    rank: int,
    rounds: int = 8,
    tol: float = 1e-4,
    *,
    cg_steps: int = 5,
    ridge: float = RIDGE,
) -> SpatialSolution:
    """Fit separable kernels to every layer by alternating least squares under the data norm.

    Args:
        rank: channels between the two convolutions, 1 .. min(I * h, O * w).
        rounds: most alternations; 0 keeps the vertical filters of the unfolded SVD.
        tol: stop when a round lowers the objective by less than this fraction.
        ridge: floor of the moments, relative to their mean diagonal.

    Returns:
        Factors in the dtype of ``problem.weights``; the rows of ``vertical`` are orthonormal per layer.

    Raises:
        SharefoldError: the rank does not fit the layers.
    """
    limit = spatial_max_rank(problem)
    if not 1 <= rank <= limit:
        raise SharefoldError(f"spatial: rank {rank}: these layers allow 1 to {limit}")
    dtype, (high, wide) = problem.weights.dtype, problem.kernel
    problem = problem.working()
    work = _Spatial(problem, ridge)
    vertical = work.start(rank)
    horizontal = work.fit_horizontal(vertical, None)
    history = [work.objective(horizontal, vertical)]
    for _ in range(rounds):
        before = (vertical, horizontal)
        factored = torch.linalg.qr(work.fit_vertical(horizontal, vertical, cg_steps).transpose(1, 2))
        vertical = factored.Q.transpose(1, 2)
        # W = H R^T Q^T: what the orthonormal filters lost goes into the horizontal ones.
        horizontal = torch.einsum("korx,ksr->kosx", horizontal, factored.R)
        horizontal = work.fit_horizontal(vertical, horizontal)
        value = work.objective(horizontal, vertical)
        if not value <= history[-1]:
            vertical, horizontal = before
            break
        history.append(value)
        if history[-2] - value <= tol * history[-2]:
            break
    errors = problem.errors(work.compose(horizontal, vertical))
    members, rows = problem.members, problem.rows
    return SpatialSolution(
        vertical.reshape(members, rank, -1, high, 1).to(dtype),
        horizontal.reshape(members, rows, rank, 1, wide).to(dtype),
        errors.to(dtype),
        history,
    )


def spatial_curve(
    problem: Problem,
    ranks: Sequence[int] | None = None,
    *,
    als_rounds: int = 0,
    als_ranks: int = 5,
    ridge: float = RIDGE,
) -> list[CurvePoint]:
    """Errors and cost at several ranks of the separable form.

    Without ``als_rounds`` the errors are those of the unfolded SVD's vertical filters with best horizontal ones;
    with it a few ranks are solved and the others corrected by the interpolated log ratio.
    """
    problem = problem.working()
    limit = spatial_max_rank(problem)
    members, rows, columns = problem.weights.shape
    wide = problem.kernel[1]
    if ranks is None:
        ranks = default_ranks(max(1, min(limit, rows * columns // (columns // wide + rows * wide))))
    ranks = sorted({min(limit, max(1, int(r))) for r in ranks})
    work = _Spatial(problem, ridge)
    table = nested_errors(problem, work.spread(work.start(ranks[-1])), ridge)
    points = [
        CurvePoint(r, spatial_cost(r, members, rows, columns, problem.kernel), table[:, r * wide - 1]) for r in ranks
    ]
    if als_rounds:
        points = correct_curve(
            points, lambda rank: spatial_solve(problem, rank, rounds=als_rounds, ridge=ridge).errors, als_ranks
        )
    return points
