"""All conv groups at once give what the solver of one group gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharefold.solvers import tie, tie_groups
from sharefold.solvers.data_norm import Problem


def random_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K, G, R, N), moments (K, G, N, N) and factors (K, G, R)."""
    roots = torch.randn(4, 3, 9, 12)
    return torch.randn(4, 3, 2, 9) + 0.7, roots @ roots.transpose(2, 3), torch.rand(4, 3, 2) + 0.1


@pytest.mark.parametrize("scaled", [False, True])
def test_agrees_with_the_solver_of_one_group(scaled: bool) -> None:
    weights, moments, factors = random_problem()
    kernel, scales = tie_groups.solve(weights, moments, factors, scaled, rounds=200, tol=1e-9)
    for group in range(3):
        problem = Problem(
            weights[:, group], moments[:, group], factors[:, group], layer_weights=torch.ones(4)
        )
        expected = tie.solve(problem, scale=scaled, rounds=200, tol=1e-9)
        approximation = kernel[group].expand(4, -1, -1)
        if scales is not None:
            approximation = approximation * scales[:, group].unsqueeze(2)
        found, best = problem.error_sum(approximation), problem.error_sum(expected.approximation)
        assert found == pytest.approx(best, rel=1e-3) if not scaled else found <= best * 1.05


def test_scales_never_do_worse_and_a_common_kernel_is_found() -> None:
    _, moments, factors = random_problem()
    common = torch.randn(3, 2, 9)
    scales = torch.rand(4, 3, 2) + 0.5
    kernel, found = tie_groups.solve(scales.unsqueeze(3) * common, moments, factors, True, rounds=100, tol=0)
    assert found is not None
    assert torch.allclose(found.unsqueeze(3) * kernel, scales.unsqueeze(3) * common, atol=1e-3)


def test_a_dead_layer_does_no_harm() -> None:
    weights, moments, factors = random_problem()
    weights[0], moments[1] = 0, 0
    kernel, scales = tie_groups.solve(weights, moments, factors, True)
    assert torch.isfinite(kernel).all() and scales is not None and torch.isfinite(scales).all()
