from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sharefold.errors import SharefoldError
from sharefold.solvers import low_rank
from sharefold.solvers.data_norm import Problem

from .problems import non_increasing, problem, sqrt_psd


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_errors_are_the_tail_of_the_whitened_spectrum(deficient: bool, shape: tuple[int, int]) -> None:
    group = problem(2, *shape, deficient=deficient)
    white = group.row_metric.sqrt().unsqueeze(2) * group.weights @ sqrt_psd(group.second)
    values = torch.linalg.svdvals(white).square()
    for point in low_rank.svd_curve(group, range(1, 7)):
        expected = values[:, point.rank :].sum(1) / values.sum(1)
        torch.testing.assert_close(point.errors, expected, rtol=1e-6, atol=1e-7)
        solution = low_rank.svd_solve(group, point.rank)
        torch.testing.assert_close(solution.errors, expected, rtol=1e-6, atol=1e-7)
        assert point.cost == 2 * point.rank * 18


def test_factors_have_orthonormal_rows() -> None:
    solution = low_rank.svd_solve(problem(2), 3)
    gram = solution.right @ solution.right.transpose(1, 2)
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))


def test_silent_rows() -> None:
    group = problem()
    weights = group.row_metric.clone()
    weights[:, 0] = 0
    silent = Problem(group.weights, group.second, weights)
    assert torch.isfinite(low_rank.svd_solve(silent, 3).left).all()


def test_impossible_rank_is_refused() -> None:
    with pytest.raises(SharefoldError, match="1 to 6"):
        low_rank.svd_solve(problem(), 7)


def separable(group: Problem, solution: low_rank.SpatialSolution, k: int) -> torch.Tensor:
    high, wide = group.kernel
    kernel = torch.einsum("orx,riy->oiyx", solution.horizontal[k, :, :, 0], solution.vertical[k, :, :, :, 0])
    assert kernel.shape[2:] == (high, wide)
    return kernel.flatten(1)


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 3), (3, 1)])
def test_spatial_descends_to_the_error_it_reports(kernel: tuple[int, int], deficient: bool) -> None:
    group = problem(2, 5, 4 * kernel[0] * kernel[1], kernel=kernel, deficient=deficient)
    solution = low_rank.spatial_solve(group, 3, rounds=20, tol=0)
    assert solution.vertical.shape == (2, 3, 4, kernel[0], 1)
    assert solution.horizontal.shape == (2, 5, 3, 1, kernel[1])
    assert non_increasing(solution.history, 1e-7)
    approx = torch.stack([separable(group, solution, k) for k in range(2)])
    torch.testing.assert_close(approx, solution.approximation)
    torch.testing.assert_close(group.errors(approx), solution.errors)
    # rel: the history holds the floored moments
    assert group.error_sum(approx) == pytest.approx(solution.history[-1], rel=1e-2, abs=1e-4)


def test_spatial_is_two_convolutions() -> None:
    group = problem(1, 5, 36, kernel=(3, 3))
    solution = low_rank.spatial_solve(group, 4)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    composed = F.conv2d(x, solution.approximation[0].reshape(5, 4, 3, 3), padding=1)
    inner = F.conv2d(x, solution.vertical[0], padding=(1, 0))
    torch.testing.assert_close(F.conv2d(inner, solution.horizontal[0], padding=(0, 1)), composed)


def test_vertical_step_is_least_squares() -> None:
    group = problem(2, 5, 18, kernel=(3, 3))
    work = low_rank._Spatial(group, 1e-12)
    horizontal = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    got = work.fit_vertical(horizontal, torch.zeros(2, 2, 6, dtype=torch.float64), 200)
    for k in range(2):
        units = torch.eye(12, dtype=torch.float64).reshape(12, 2, 6)
        root = sqrt_psd(group.second[k])
        scale = group.row_metric[k].sqrt()[:, None]
        images = [
            (scale * torch.einsum("orx,rj->ojx", horizontal[k], unit).flatten(1) @ root).flatten() for unit in units
        ]
        target = (scale * group.weights[k] @ root).flatten()
        expected = torch.linalg.lstsq(torch.stack(images, 1), target[:, None]).solution.reshape(2, 6)
        torch.testing.assert_close(got[k], expected, rtol=1e-4, atol=1e-5)


def test_spatial_at_full_rank_is_exact_and_one_tap_is_svd() -> None:
    assert float(low_rank.spatial_solve(problem(2, 5, 36, kernel=(3, 3)), 12).errors.max()) < 1e-8
    pointwise = problem(2, 6, 12)
    torch.testing.assert_close(
        low_rank.spatial_solve(pointwise, 3).errors, low_rank.svd_solve(pointwise, 3).errors, rtol=1e-4, atol=1e-6
    )


def test_spatial_curve() -> None:
    group = problem(2, 12, 36, kernel=(3, 3))
    for point in low_rank.spatial_curve(group, [1, 3, 6]):
        exact = low_rank.spatial_solve(group, point.rank, rounds=0).errors
        torch.testing.assert_close(point.errors, exact, rtol=1e-3, atol=1e-5)
        assert point.cost == 2 * point.rank * (12 + 36)
    corrected = low_rank.spatial_curve(group, als_rounds=5, als_ranks=6)
    for point in corrected:
        exact = low_rank.spatial_solve(group, point.rank, rounds=5).errors
        assert float(point.errors.sum()) == pytest.approx(float(exact.sum()), rel=0.2, abs=1e-4)
    with pytest.raises(SharefoldError, match="1 to 12"):
        low_rank.spatial_solve(group, 13)
