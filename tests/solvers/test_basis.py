from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers import shared_basis
from sharefold.solvers.curves import CurvePoint, correct_curve, nested_errors
from sharefold.solvers.data_norm import Problem

from .problems import non_increasing, problem, sqrt_psd


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_layer_is_the_truncated_whitened_svd(rank: int) -> None:
    group = problem(members=1)
    white = group.row_metric[0].sqrt()[:, None] * group.weights[0] @ sqrt_psd(group.second[0])
    values = torch.linalg.svdvals(white).square()
    solution = shared_basis.solve(group, rank)
    assert float(solution.errors) == pytest.approx(float(values[rank:].sum() / values.sum()), rel=1e-4)


@pytest.mark.parametrize("deficient", [False, True])
def test_coefficients_are_least_squares(deficient: bool) -> None:
    group = problem(deficient=deficient)
    solution = shared_basis.solve(group, 4, iterations=3, ridge=1e-12)
    for k in range(group.members):
        root = sqrt_psd(group.second[k])
        expected = torch.linalg.lstsq((solution.basis @ root).T, (group.weights[k] @ root).T).solution.T
        approx = group.weights.clone()
        approx[k] = expected @ solution.basis
        assert float(solution.errors[k]) == pytest.approx(float(group.errors(approx)[k]), rel=1e-5, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    members=st.integers(1, 4),
    rows=st.integers(1, 7),
    columns=st.integers(2, 10),
    share=st.floats(0, 1),
    unique=st.integers(0, 1),
    deficient=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_shapes_and_descent(members, rows, columns, share, unique, deficient, dtype) -> None:
    group = problem(members, rows, columns, deficient=deficient, dtype=dtype)
    limit = shared_basis.max_rank(group)
    rank = 1 + round(share * (limit - 1))
    solution = shared_basis.solve(group, rank, iterations=4, unique=unique)
    assert solution.basis.shape == (rank, columns) and solution.basis.dtype == dtype
    assert solution.coefficients.shape == (members, rows, rank + unique)
    assert non_increasing(solution.history)
    gram = solution.basis.double() @ solution.basis.double().T
    torch.testing.assert_close(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(solution.errors, group.errors(solution.approximation), rtol=1e-2, atol=1e-4)
    if rank == limit:
        assert float(solution.errors.max()) < 1e-5


def test_iterations_beat_the_one_shot_start() -> None:
    group = problem(members=5, rows=8, columns=18)
    solution = shared_basis.solve(group, 6, iterations=40, tol=0)
    assert solution.history[-1] < 0.98 * solution.history[0]
    assert solution.history[-1] == pytest.approx(group.error_sum(solution.approximation), rel=1e-3)


def test_many_iterations_reach_a_stationary_point() -> None:
    group = problem(members=3, rows=8, columns=10)
    solution = shared_basis.solve(group, 5, iterations=400, tol=0)
    shared = solution.basis.clone().requires_grad_()
    gap = group.weights - solution.coefficients @ shared
    loss = (group.objective_weights * (group.apply_left(gap) * (gap @ group.second)).sum((1, 2))).sum()
    (gradient,) = torch.autograd.grad(loss, shared)
    assert float(gradient.norm()) < 1e-2 * float(loss.detach())


def test_own_filters_lower_the_error() -> None:
    group = problem(members=4, rows=8, columns=18)
    shared, mixed = shared_basis.solve(group, 4), shared_basis.solve(group, 4, unique=2)
    assert mixed.unique is not None and mixed.unique.shape == (4, 2, 18)
    assert float(mixed.errors.sum()) < float(shared.errors.sum())


def test_float32_agrees_with_float64() -> None:
    group = problem(members=4, rows=8, columns=18)
    single = shared_basis.solve(group.to(torch.float32), 6, iterations=3)
    torch.testing.assert_close(single.errors.double(), shared_basis.solve(group, 6, iterations=3).errors, rtol=1e-3, atol=1e-6)


def test_curve_points_equal_solving_at_their_start() -> None:
    group = problem(members=3, rows=6, columns=12)
    for point in shared_basis.curve(group, range(1, 12)):
        exact = shared_basis.solve(group, point.rank, iterations=0)
        torch.testing.assert_close(point.errors, exact.errors, rtol=1e-3, atol=1e-5)
        assert point.cost == point.rank * 12 + 3 * 6 * point.rank


def test_corrected_curve_follows_the_solutions() -> None:
    group = problem(members=5, rows=12, columns=36)
    ranks = list(range(2, 20))
    points = shared_basis.curve(group, ranks, iterations=5, solved=5)
    for point in points:
        exact = float(shared_basis.solve(group, point.rank, iterations=5).errors.sum())
        assert float(point.errors.sum()) == pytest.approx(exact, rel=0.1)


def test_default_curve_stops_where_sharing_stops_saving() -> None:
    group = problem(members=4, rows=12, columns=36)
    points = shared_basis.curve(group)
    assert points[0].rank == 1
    assert points[-1].cost <= 4 * 12 * 36
    assert all(a.rank < b.rank for a, b in itertools.pairwise(points))


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(SharefoldError, match="1 to 12"):
        shared_basis.solve(problem(), 13)
    with pytest.raises(SharefoldError, match="own filters"):
        shared_basis.solve(problem(), 3, unique=7)
    with pytest.raises(SharefoldError, match="init"):
        shared_basis.solve(problem(), 3, init=torch.randn(2, 12))


def test_dead_layer_is_harmless() -> None:
    group = problem()
    moments = group.second.clone()
    moments[1] = 0
    solution = shared_basis.solve(Problem(group.weights, moments), 4)
    assert torch.isfinite(solution.coefficients).all() and torch.isfinite(solution.errors).all()


def test_moments_that_are_not_finite_end_with_an_error() -> None:
    problem = Problem(torch.randn(2, 4, 9), torch.eye(9).repeat(2, 1, 1) * float("nan"))
    with pytest.raises(SharefoldError, match="not finite"):
        nested_errors(problem, torch.eye(9)[:3], 1e-6)


def test_what_is_next_to_nothing_does_not_tell_of_errors_that_are_not() -> None:
    """Where both errors are rounding their ratio is anything: the points before the last must not be multiplied by it."""
    estimates = torch.tensor([[0.4, 0.3], [0.04, 0.03], [0.004, 0.003], [1e-12, 1e-9]])
    points = [CurvePoint(rank, rank, errors) for rank, errors in zip((4, 16, 32, 64), estimates, strict=True)]
    exact = {4: 0.8 * estimates[0], 64: torch.tensor([2e-7, 1e-11])}
    found = correct_curve(points, exact.__getitem__, 2)
    for point, estimate in list(zip(found, estimates, strict=True))[1:3]:
        assert bool((point.errors > 0.79 * estimate).all()) and bool((point.errors < 1.01 * estimate).all())
    assert torch.equal(found[-1].errors, exact[64])
