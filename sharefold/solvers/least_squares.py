"""Least squares that are pulled towards a given solution: ``C = (Y + rho C0)(S + rho I)^-1``.

S = E[a a^T] are moments of what the coefficients multiply, Y = E[y a^T] products with what they should give. The pull rho is a
share of S's mean diagonal, so that directions which the samples hardly show keep the coefficients that they have (ridge
regression towards C0; Hoerl and Kennard, https://doi.org/10.1080/00401706.1970.10488634).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.solvers.data_norm import solve_psd

SMALLEST = 1e-12
# Pulls rho, as a share of the mean diagonal of S: of a layer whose factors are solved again towards the original's weight, and
# of coefficients that are refitted during rounding towards those so far.
FACTORS_PULL = 1e-3
ROUNDING_PULL = 1e-2


class PulledLeastSquares:
    """One system for any number of right-hand sides.

    Args:
        gram: (..., N, N) moments S, symmetric positive semi-definite; float64 is used as it is, and asked for.
        ridge: rho over the mean diagonal of S.
    """

    def __init__(self, gram: Tensor, ridge: float) -> None:
        self.rho = (ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)).clamp_min(SMALLEST)[..., None, None]
        self.normal = gram + self.rho * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)

    def solve(self, cross: Tensor, start: Tensor) -> Tensor | None:
        """Coefficients (..., O, N) for products Y and a start C0, both (..., O, N); None where the system cannot be solved."""
        solved, failed = torch.linalg.solve_ex(self.normal, self.right(cross, start))
        return _finite(solved, failed)

    def factored(self) -> Tensor | None:
        """Cholesky factor of S + rho I, for rounds with other right-hand sides (:meth:`right`); None where there is none."""
        factor, failed = torch.linalg.cholesky_ex(self.normal)
        return None if bool(failed.any()) else factor

    def right(self, cross: Tensor, start: Tensor) -> Tensor:
        """(..., N, O): the right-hand side (Y + rho C0)^T."""
        return (cross + self.rho * start).transpose(-2, -1)

    def robust(self, cross: Tensor, start: Tensor) -> Tensor:
        """As :meth:`solve`, and where S is numerically singular, by its eigenvalues."""
        return solve_psd(self.normal, self.right(cross, start)).transpose(-2, -1)


def _finite(solved: Tensor, failed: Tensor) -> Tensor | None:
    if bool(failed.any()) or not bool(torch.isfinite(solved).all()):
        return None
    return solved.transpose(-2, -1)
