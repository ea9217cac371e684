"""Leading directions against a plain singular value decomposition."""

from __future__ import annotations

import torch

from sharefold.solvers.data_norm import eigen_psd
from sharefold.solvers.directions import leading, leading_whitened, orthonormal

from .problems import moments, sqrt_psd


def test_leading_directions_are_the_singular_vectors_under_the_moments() -> None:
    torch.manual_seed(0)
    rows, second = torch.randn(2, 9, 6, dtype=torch.float64), moments(2, 6)
    root, values_and_vectors = sqrt_psd(second), eigen_psd(second)
    expected = torch.linalg.svd(rows @ root).Vh[:, :3] @ torch.linalg.inv(root)
    gram = rows.mT @ rows
    found = values_and_vectors[1] @ leading_whitened(gram, *values_and_vectors, 3)
    signs = (found.mT * expected).sum(2, keepdim=True).sign()
    torch.testing.assert_close(found.mT * signs, expected, rtol=1e-6, atol=1e-9)
    basis = leading(gram, *values_and_vectors, 3)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    torch.testing.assert_close(expected @ basis.mT @ basis, expected, rtol=1e-6, atol=1e-9)  # they span the same


def test_no_rows_are_orthonormal() -> None:
    assert orthonormal(torch.zeros(4, 0, 6)).shape == (4, 0, 6)
