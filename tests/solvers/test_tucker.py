from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from sharefold.errors import SharefoldError
from sharefold.solvers import shared_basis, tucker_als
from sharefold.solvers.data_norm import Problem

from .problems import moments, non_increasing, problem


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descent_shapes_and_errors(deficient: bool, dtype: torch.dtype) -> None:
    group = problem(3, 6, 36, kernel=(3, 3), deficient=deficient, dtype=dtype)
    solution = tucker_als.solve(group, 5, 3, rounds=10, tol=0)
    assert solution.projection.shape == (3, 4) and solution.basis.shape == (5, 27)
    assert solution.coefficients.shape == (3, 6, 5) and solution.basis.dtype == dtype
    assert non_increasing(solution.history) and len(solution.history) > 2
    torch.testing.assert_close(solution.errors, group.errors(solution.approximation), rtol=1e-3, atol=1e-5)
    kept = sum(t.numel() for t in (solution.projection, solution.basis, solution.coefficients))
    assert kept == tucker_als.cost(5, 3, 3, 6, 36, 9)


def test_full_width_is_the_filter_basis() -> None:
    group = problem(3, 6, 18, kernel=(3, 3))
    full = tucker_als.solve(group, 4, 2, rounds=20, tol=0)
    plain = shared_basis.solve(group, 4, iterations=60, tol=0)
    assert float(full.errors.sum()) == pytest.approx(float(plain.errors.sum()), rel=0.02)


def test_it_is_three_convolutions() -> None:
    group = problem(2, 6, 36, kernel=(3, 3))
    solution = tucker_als.solve(group, 5, 3, rounds=2)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    expected = F.conv2d(x, solution.approximation[1].reshape(6, 4, 3, 3), padding=1)
    inner = F.conv2d(x, solution.projection[:, :, None, None])
    inner = F.conv2d(inner, solution.basis.reshape(5, 3, 3, 3), padding=1)
    torch.testing.assert_close(F.conv2d(inner, solution.coefficients[1][:, :, None, None]), expected)


def test_a_planted_input_space_is_found() -> None:
    projection = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64)).Q.T
    planted = torch.randn(3, 5, 4, dtype=torch.float64) @ torch.randn(4, 18, dtype=torch.float64)
    group = Problem(tucker_als.lift(planted, projection), moments(3, 54), kernel=(3, 3))
    assert float(tucker_als.solve(group, 4, 2, rounds=30, tol=0).errors.max()) < 1e-4


def test_projection_step_is_stationary() -> None:
    group = problem(2, 5, 36, kernel=(3, 3))
    work = tucker_als._Tucker(group, 0.0)
    shared, coefficients = torch.randn(4, 27, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    got = work.fit_projection(shared, coefficients, torch.zeros(3, 4, dtype=torch.float64), 100).requires_grad_()
    gap = group.weights - coefficients @ tucker_als.lift(shared, got)
    loss = (group.objective_weights * (group.apply_left(gap) * (gap @ group.second)).sum((1, 2))).sum()
    (gradient,) = torch.autograd.grad(loss, got)
    assert float(gradient.abs().max()) < 1e-6 * float(loss.detach())


def test_curve_is_a_frontier_near_the_solutions() -> None:
    group = problem(3, 8, 72, kernel=(3, 3))
    points = tucker_als.curve(group, als_rounds=4)
    assert len({p.width for p in points}) > 1
    for a, b in itertools.pairwise(points):
        assert a.cost < b.cost and float(a.errors.sum()) > float(b.errors.sum())
    for point in points[:: len(points) // 4]:
        exact = tucker_als.solve(group, point.rank, point.width, rounds=4).errors
        assert float(point.errors.sum()) == pytest.approx(float(exact.sum()), rel=0.15)


def test_refusals() -> None:
    with pytest.raises(SharefoldError, match="width 5"):
        tucker_als.solve(problem(3, 6, 36, kernel=(3, 3)), 4, 5)
    with pytest.raises(SharefoldError, match="1 to 9"):
        tucker_als.solve(problem(3, 6, 36, kernel=(3, 3)), 10, 1)
