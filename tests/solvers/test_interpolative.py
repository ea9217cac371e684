"""Pivots: the same matrix with rank squared fewer numbers, and none of them large."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.layers import free_columns, with_pivots
from sharefold.solvers.interpolative import LARGEST, pivot


def orthonormal(rank: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64)).Q.T


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_the_product_stays_and_nothing_is_large(rank: int, others: int, seed: int) -> None:
    rows = orthonormal(rank, rank + others, seed)
    pivots, free, mix = pivot(rows)
    assert free.shape == (rank, others) and free.dtype == rows.dtype and pivots.tolist() == sorted(set(pivots.tolist()))
    assert float(free.abs().max()) <= LARGEST
    torch.testing.assert_close(mix @ with_pivots(free, pivots), rows)
    assert torch.equal(rows[:, pivots], mix)
    assert sorted([*pivots.tolist(), *free_columns(pivots, rank + others).tolist()]) == list(range(rank + others))


def test_rows_that_hardly_differ_are_still_told_apart() -> None:
    rows = orthonormal(6, 30)
    rows[5] = rows[4] + 1e-5 * rows[5]
    pivots, free, mix = pivot(rows)
    assert float(free.abs().max()) <= LARGEST
    torch.testing.assert_close(mix @ with_pivots(free, pivots), rows, rtol=0, atol=1e-9)


def test_gradients_reach_the_free_columns_and_integers_of_any_size_do() -> None:
    free = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        pivots = torch.tensor([6, 0, 3]).to(dtype)
        matrix = with_pivots(free, pivots)
        assert torch.equal(matrix[:, [6, 0, 3]], torch.eye(3, dtype=torch.float64))
        assert torch.equal(matrix[:, free_columns(pivots, 7)], free)
    assert torch.autograd.gradcheck(lambda t: with_pivots(t, pivots), (free,))


def test_what_cannot_be_pivoted_is_refused() -> None:
    with pytest.raises(SharefoldError, match="5 rows of 5 columns leave nothing"):
        pivot(torch.eye(5))
    rows = orthonormal(3, 8)
    rows[2] = rows[0] - rows[1]
    with pytest.raises(SharefoldError, match="3 rows depend on each other"):
        pivot(rows)
