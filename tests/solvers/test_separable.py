"""Separable kernels: they compose, descend, and end at the truncated SVD where there is one tap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sharefold.errors import SharefoldError
from sharefold.solvers import low_rank, separable
from sharefold.solvers.data_norm import Problem

from .problems import non_increasing, problem


def kernel_of(group: Problem, solution: separable.SpatialSolution, k: int) -> torch.Tensor:
    high, wide = group.kernel
    kernel = torch.einsum("orx,riy->oiyx", solution.horizontal[k, :, :, 0], solution.vertical[k, :, :, :, 0])
    assert kernel.shape[2:] == (high, wide)
    return kernel.flatten(1)


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 3), (3, 1)])
def test_spatial_descends_to_the_error_it_reports(kernel: tuple[int, int], deficient: bool) -> None:
    group = problem(2, 5, 4 * kernel[0] * kernel[1], kernel=kernel, deficient=deficient)
    solution = separable.solve(group, 3, iterations=30, tol=0)
    assert solution.vertical.shape == (2, 3, 4, kernel[0], 1)
    assert solution.horizontal.shape == (2, 5, 3, 1, kernel[1])
    assert non_increasing(solution.history, 1e-7)
    approx = torch.stack([kernel_of(group, solution, k) for k in range(2)])
    torch.testing.assert_close(approx, solution.approximation)
    torch.testing.assert_close(group.errors(approx), solution.errors)
    # rel: the history holds the floored moments
    assert group.error_sum(approx) == pytest.approx(solution.history[-1], rel=1e-2, abs=1e-4)


def test_spatial_is_two_convolutions() -> None:
    group = problem(1, 5, 36, kernel=(3, 3))
    solution = separable.solve(group, 4)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    composed = F.conv2d(x, solution.approximation[0].reshape(5, 4, 3, 3), padding=1)
    inner = F.conv2d(x, solution.vertical[0], padding=(1, 0))
    torch.testing.assert_close(F.conv2d(inner, solution.horizontal[0], padding=(0, 1)), composed)


def test_spatial_at_full_rank_is_exact_and_one_tap_is_svd() -> None:
    assert float(separable.solve(problem(2, 5, 36, kernel=(3, 3)), 12).errors.max()) < 1e-8
    pointwise = problem(2, 6, 12)
    torch.testing.assert_close(
        separable.solve(pointwise, 3).errors, low_rank.svd_solve(pointwise, 3).errors, rtol=1e-4, atol=1e-6
    )


def test_spatial_curve() -> None:
    group = problem(2, 12, 36, kernel=(3, 3))
    for point in separable.curve(group, [1, 3, 6]):
        exact = separable.solve(group, point.rank, iterations=0).errors
        torch.testing.assert_close(point.errors, exact, rtol=1e-3, atol=1e-5)
        assert point.cost == 2 * point.rank * (12 + 36)
    corrected = separable.curve(group, iterations=5, solved=6)
    for point in corrected:
        exact = separable.solve(group, point.rank, iterations=5).errors
        assert float(point.errors.sum()) == pytest.approx(float(exact.sum()), rel=0.2, abs=1e-4)
    with pytest.raises(SharefoldError, match="1 to 12"):
        separable.solve(group, 13)
