from __future__ import annotations

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.solvers import low_rank
from sharefold.solvers.data_norm import Problem

from .problems import problem, sqrt_psd


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
