"""Half of a symmetric product, and its mirror image."""

from __future__ import annotations

import pytest
import torch

from sharefold.solvers.gram import FEW_ROWS, MANY_FEATURES, MANY_ROWS, gram

SIZES = [1, FEW_ROWS, FEW_ROWS + 1, 2 * FEW_ROWS, 5 * FEW_ROWS - 3, MANY_FEATURES + MANY_ROWS + 5]


@pytest.mark.parametrize("features", SIZES)
@pytest.mark.parametrize("kept", [torch.float32, torch.float64])
def test_it_is_the_whole_product(features: int, kept: torch.dtype) -> None:
    x = torch.randn(2, features, 7, dtype=kept, generator=torch.Generator().manual_seed(0))
    found = gram(x)
    assert found.dtype == kept and torch.allclose(found, torch.einsum("gnp,gmp->gnm", x, x), atol=1e-4)
    assert torch.allclose(found, found.transpose(1, 2), atol=1e-5)


def test_samples_that_lie_side_by_side_in_memory() -> None:
    x = torch.randn(50, 3, 300, generator=torch.Generator().manual_seed(0)).permute(1, 2, 0)
    assert not x.is_contiguous() and torch.allclose(gram(x), x @ x.transpose(1, 2), atol=1e-4)


def test_without_samples_it_is_zero() -> None:
    assert not gram(torch.zeros(2, 300, 0)).any() and gram(torch.zeros(2, 300, 0)).shape == (2, 300, 300)
