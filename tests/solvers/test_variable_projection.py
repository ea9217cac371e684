"""Shared and own filters together: value and slope against brute force, descent, exact recovery."""

from __future__ import annotations

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.solvers import separable, shared_and_own, shared_basis
from sharefold.solvers.data_norm import Problem
from sharefold.solvers.directions import orthonormal
from sharefold.solvers.filter_descent import refine
from sharefold.solvers.lbfgs import minimize
from sharefold.solvers.low_rank import svd_solve
from sharefold.solvers.variable_projection import VariableProjection

from .problems import non_increasing, problem


def brute_force(given: Problem, basis: torch.Tensor, own: torch.Tensor, kind: str, groups: int) -> torch.Tensor:
    """The weighted error with coefficients from a dense least-squares problem per row, written out filter by filter."""
    height, width = given.kernel
    total = torch.zeros((), dtype=torch.float64)
    for e in range(given.members):
        rows = []
        for vertical in own[e // groups]:
            if kind == "rows":
                rows.append(vertical)
                continue
            for column in range(width):
                kernel = torch.zeros(given.columns // (height * width), height, width, dtype=torch.float64)
                onehot = torch.zeros(width, dtype=torch.float64)
                onehot[column] = 1
                kernel = kernel + vertical.reshape(-1, height, 1) * onehot
                rows.append(kernel.flatten())
        filters = torch.stack([*rows, *basis])
        moment = given.second[e]
        weights = given.weights[e]
        normal = filters @ moment @ filters.T
        coefficients = torch.linalg.solve(normal, filters @ moment @ weights.T).T
        gap = weights - coefficients @ filters
        metric = torch.diag(given.row_metric[e])
        total = total + given.objective_weights[e] * torch.trace(metric @ gap @ moment @ gap.T)
    return total


@pytest.mark.parametrize(
    ("kind", "kernel", "groups"),
    [("columns", (3, 2), 1), ("columns", (2, 3), 2), ("rows", (1, 1), 1), ("rows", (2, 2), 2)],
)
def test_value_and_slope_are_those_of_brute_force(kind, kernel, groups) -> None:
    given = problem(4, 5, 12, kernel=kernel)
    size = 12 // kernel[1] if kind == "columns" else 12
    torch.manual_seed(1)
    basis = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    own = torch.randn(4 // groups, 2, size, dtype=torch.float64, requires_grad=True)
    expected = brute_force(given, basis, own, kind, groups)
    slopes = torch.autograd.grad(expected, (basis, own))
    work = VariableProjection(given, kind, groups=groups, ridge=1e-14)
    value, slope, own_slope = work.evaluate(basis.detach(), own.detach())
    assert value == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(slope, slopes[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(own_slope, slopes[1], rtol=1e-6, atol=1e-9)
    errors = work.errors(basis.detach(), own.detach())
    assert float((errors * given.energy * given.objective_weights).sum()) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_layers_that_are_hybrids_are_found_exactly(kind) -> None:
    torch.manual_seed(2)
    shape = problem(4, 8, 18, kernel=(3, 3))
    work = VariableProjection(shape, kind)
    basis, own = torch.randn(2, 18, dtype=torch.float64), torch.randn(4, 1, work.columns, dtype=torch.float64)
    filters = work.stack(basis, own)
    weights = torch.randn(4, 8, filters.shape[1], dtype=torch.float64) @ filters
    exact = Problem(weights, shape.moments, shape.row_weights, shape.kernel)
    work = VariableProjection(exact, kind)
    near = basis + 0.3 * torch.randn_like(basis), own + 0.3 * torch.randn_like(own)
    basis, own, history = refine(work, orthonormal(near[0]), orthonormal(near[1]), iterations=300, tol=0)
    assert history[0] > 0.01 and float(work.errors(basis, own).max()) < 1e-7


def test_the_answer_is_never_worse_than_the_start_and_its_rows_are_orthonormal() -> None:
    given = problem(3, 6, 18, kernel=(3, 3), deficient=True)
    work = VariableProjection(given)
    start = work.start(3, 2)
    basis, own, history = refine(work, *start, iterations=50)
    assert non_increasing(history) and history[-1] < 0.9 * history[0]
    assert history[0] == pytest.approx(work.evaluate(*start)[0])
    # Next to nothing is left of it: differences of large numbers.
    assert work.evaluate(basis, own)[0] == pytest.approx(history[-1], abs=1e-9 * work.total)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(own @ own.transpose(1, 2), torch.eye(2, dtype=torch.float64).expand(3, 2, 2))


def test_own_whole_filters_alone_are_those_of_the_truncated_svd() -> None:
    given = problem(4, 8, 18, kernel=(3, 3))
    empty, whole = given.weights.new_zeros(0, 18), VariableProjection(given, "rows")
    best = svd_solve(given, 3)
    _, own, _ = refine(whole, empty, whole.start_own(3, empty), iterations=200, tol=0)
    torch.testing.assert_close(whole.errors(empty, own), best.errors, rtol=1e-3, atol=1e-6)


def test_the_largest_moment_that_is_left() -> None:
    given = problem(4, 8, 18, kernel=(3, 3))
    work = VariableProjection(given)
    basis, own = work.start(3, 2)
    filters = work.stack(basis, own)
    found = work.largest_left(filters, filters @ work.moments)
    for e in range(4):
        image = filters[e] @ work.moments[e]
        left = work.moments[e] - image.T @ torch.linalg.solve(image @ filters[e].T, image)
        top = float(torch.linalg.eigvalsh(left)[-1])
        assert 0.8 * top <= float(found[e]) <= 1.001 * top  # the power method comes from below
    spanned = torch.eye(18, dtype=torch.float64).expand(4, 18, 18)
    assert bool((work.largest_left(spanned, work.moments) > 0).all())


def test_both_parts_beat_either_at_the_same_size() -> None:
    given = problem(5, 12, 36, kernel=(3, 3))
    # 3 shared and 3 own filters cost 3 * (36 + 60) + 5 * 3 * (12 + 36) = 1,008, as 10.5 shared or 4.2 own ones do.
    both = shared_and_own.solve(given, 3, 3)
    assert both.errors.mean() < shared_basis.solve(given, 10, iterations=60).errors.mean()
    assert both.errors.mean() < separable.solve(given, 4, iterations=60).errors.mean()


def test_narrow_layers_own_filters_stay_within_their_inputs() -> None:
    given = problem(3, 6, 18, kernel=(3, 3))
    given.weights[1, :, 9:] = 0
    given.second[1, 9:] = 0
    given.second[1, :, 9:] = 0
    given = Problem(given.weights, given.moments, given.row_weights, given.kernel)
    found = shared_and_own.solve(given, 2, 2, inputs=[6, 3, 6])
    assert not found.own[1, :, 3:].any() and found.own[0, :, 3:].any()
    assert float(found.errors.max()) < 1


def test_own_filters_for_shared_ones_that_stay() -> None:
    given = problem(1, 6, 18, kernel=(3, 3))
    basis = orthonormal(torch.randn(3, 18, dtype=torch.float64))
    work = VariableProjection(given)
    start = work.start_own(2, basis)
    found = shared_and_own.solve_own(given, basis, start)
    assert torch.equal(found.basis, basis) and non_increasing(found.history)
    assert found.errors[0] < 0.95 * work.errors(basis, start)[0] < work.errors(basis, given.weights.new_zeros(1, 0, 6))[0]


def test_numbers_that_do_not_fit() -> None:
    with pytest.raises(SharefoldError, match="1 to 12 and 0 to 6"):
        shared_and_own.solve(problem(kernel=(2, 2)), 13, 1)


def test_lbfgs_solves_a_quadratic_and_says_how_it_went() -> None:
    torch.manual_seed(3)
    root = torch.randn(8, 8, dtype=torch.float64)
    matrix, goal = root @ root.T + torch.eye(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)

    def function(x: torch.Tensor) -> tuple[float, torch.Tensor]:
        return float((x - goal) @ matrix @ (x - goal)) / 2, matrix @ (x - goal)

    point, history = minimize(function, torch.zeros(8, dtype=torch.float64), iterations=60)
    torch.testing.assert_close(point, goal, rtol=1e-5, atol=1e-5)
    assert non_increasing(history) and history[0] == function(torch.zeros(8, dtype=torch.float64))[0]
    assert minimize(function, goal, iterations=5) == (goal, [0.0])
