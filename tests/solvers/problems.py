"""Small random problems with correlated inputs for the solver tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from sharefold.solvers.data_norm import Problem, eigen_psd


def moments(members: int, columns: int, deficient: bool = False, seed: int = 0) -> Tensor:
    """Correlated second moments (K, N, N) in float64, of half rank when ``deficient``."""
    generator = torch.Generator().manual_seed(seed)
    samples = columns // 2 if deficient else 4 * columns
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    decay = torch.linspace(0, -3, columns, dtype=torch.float64).exp()
    x = torch.randn(members, samples, columns, generator=generator, dtype=torch.float64) * decay @ mixing
    x = x * (1 + torch.arange(members, dtype=torch.float64)[:, None, None])
    return x.transpose(1, 2) @ x / samples


def problem(
    members: int = 3,
    rows: int = 6,
    columns: int = 12,
    *,
    kernel: tuple[int, int] = (1, 1),
    deficient: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Random layers with a common part, per-row weights and correlated moments."""
    generator = torch.Generator().manual_seed(seed + 1)
    common = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    own = torch.randn(members, rows, columns, generator=generator, dtype=torch.float64)
    weights = common + 0.7 * own
    row_weights = torch.rand(members, rows, generator=generator, dtype=torch.float64) + 0.2
    return Problem(weights, moments(members, columns, deficient, seed), row_weights, kernel).to(dtype)


def sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root (..., N, N) of a positive semi-definite matrix, eigenvalues floored."""
    values, vectors = eigen_psd(matrix)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)


def non_increasing(history: list[float], slack: float = 1e-9) -> bool:
    return all(b <= a * (1 + slack) + 1e-14 for a, b in itertools.pairwise(history))
