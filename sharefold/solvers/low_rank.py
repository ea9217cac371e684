"""Truncated SVD of every layer under the data norm, ``W_k ~ C_k V_k``.

The optimum projects the outputs. With ``P`` the leading eigenvectors of ``D W S W^T D`` the
best rank-R matrix is ``D^-1 P P^T D W``; only O x O eigenproblems, and rank-deficient moments need no care. Prior
art: SVD-LLM (arXiv 2403.07378), BALF (arXiv 2509.25136).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.curves import CurvePoint, default_ranks
from sharefold.solvers.data_norm import Problem


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
