from __future__ import annotations

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.solvers import tie
from sharefold.solvers.data_norm import Problem

from .problems import non_increasing, problem


def test_mean() -> None:
    group = problem()
    solution = tie.solve(group, "mean", scale=False)
    torch.testing.assert_close(solution.weight, group.weights.mean(0))
    assert solution.scale is None


def test_data_optimum_without_row_weights_is_the_closed_form() -> None:
    group = problem()
    group = Problem(group.weights, group.second)
    factors = group.objective_weights
    right = torch.einsum("k,kon->on", factors, group.weighted)
    expected = torch.linalg.solve(torch.einsum("k,knm->nm", factors, group.second), right.T).T
    solution = tie.solve(group, "data", scale=False, ridge=0)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-5, atol=1e-6)


def test_data_optimum_solves_the_normal_equations_of_every_row() -> None:
    group = problem()
    solution = tie.solve(group, "data", scale=False, ridge=0)
    factors = group.objective_weights[:, None] * group.row_metric
    for o in range(group.rows):
        system = torch.einsum("k,knm->nm", factors[:, o], group.second)
        rhs = torch.einsum("k,kn->n", factors[:, o], group.weighted[:, o])
        torch.testing.assert_close(solution.weight[o], torch.linalg.solve(system, rhs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deficient", [False, True])
def test_order_of_quality_and_descent(deficient: bool) -> None:
    group = problem(deficient=deficient)
    mean = tie.solve(group, "mean", scale=False)
    data = tie.solve(group, "data", scale=False)
    scaled = tie.solve(group, "data", scale=True)
    sums = [group.error_sum(s.approximation) for s in (mean, data, scaled)]
    assert sums[0] >= sums[1] >= sums[2]
    for solution in (data, scaled):
        assert non_increasing(solution.history)
        assert group.error_sum(solution.approximation) == pytest.approx(solution.history[-1], rel=1e-2, abs=1e-4)
        torch.testing.assert_close(solution.errors, group.errors(solution.approximation))


def test_scales_find_layers_of_opposite_sign() -> None:
    shared = torch.randn(5, 9, dtype=torch.float64)
    scales = torch.randn(4, 5, dtype=torch.float64)
    group = Problem(scales.unsqueeze(2) * shared, problem(4, 5, 9).second)
    solution = tie.solve(group, "data", scale=True)
    assert float(solution.errors.max()) < 1e-6


def test_float32() -> None:
    group = problem()
    single = tie.solve(group.to(torch.float32))
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(single.errors.double(), tie.solve(group).errors, rtol=1e-4, atol=1e-6)


def test_cost_and_refusals() -> None:
    assert tie.cost(3, 6, 12) == 72 + 18
    assert tie.cost(3, 6, 12, scale=False) == 72
    with pytest.raises(SharefoldError, match="how"):
        tie.solve(problem(), "median")
