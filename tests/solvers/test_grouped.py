from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers import block_diagonal
from sharefold.solvers.data_norm import Problem

from .problems import non_increasing, problem


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(1, 3), outs=st.integers(1, 4), ins=st.integers(1, 4), second=st.booleans())
def test_composition_is_the_pair_of_grouped_convolutions(groups, outs, ins, second) -> None:
    features, channels = groups * outs, groups * ins
    first = torch.randn(1, features, ins, dtype=torch.float64)
    later = torch.randn(1, features, outs, dtype=torch.float64) if second else None
    x = torch.randn(2, channels, 3, 3, dtype=torch.float64)
    inner = F.conv2d(x, first[0][:, :, None, None], groups=groups)
    shuffled = inner.unflatten(1, (groups, outs)).transpose(1, 2).flatten(1, 2)
    expected = shuffled
    if later is not None:
        expected = F.conv2d(shuffled, later[0][:, :, None, None], groups=groups) + inner
    dense = block_diagonal.compose(first, later, groups)[0]
    torch.testing.assert_close(F.conv2d(x, dense[:, :, None, None]), expected)
    torch.testing.assert_close(block_diagonal.extract(block_diagonal.expand(first, groups), groups), first)


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_descent_and_reported_errors(deficient: bool, dtype: torch.dtype) -> None:
    group = problem(2, 8, 12, deficient=deficient, dtype=dtype)
    solution = block_diagonal.solve(group, 4, tol=0)
    assert solution.first.shape == (2, 8, 3) and solution.second is not None and solution.second.shape == (2, 8, 2)
    assert non_increasing(solution.history) and len(solution.history) > 2
    assert solution.history[-1] < solution.history[0]
    torch.testing.assert_close(solution.errors, group.errors(solution.approximation), rtol=1e-3, atol=1e-5)
    assert sum(t[0].numel() for t in (solution.first, solution.second)) == block_diagonal.cost(8, 12, 4)


def test_first_step_is_least_squares() -> None:
    group = problem(1, 6, 6)
    work = block_diagonal._Pair(group, 3, 1e-12)
    second = torch.randn(1, 6, 2, dtype=torch.float64)
    got = work.fit_first(torch.zeros(1, 6, 2, dtype=torch.float64), second, 200)
    units = torch.eye(12, dtype=torch.float64).reshape(12, 1, 6, 2)
    root = torch.linalg.cholesky(group.second[0])
    scale = group.row_metric[0].sqrt()[:, None]
    images = torch.stack([(scale * block_diagonal.compose(u, second, 3)[0] @ root).flatten() for u in units], 1)
    target = (scale * group.weights[0] @ root).flatten()
    expected = torch.linalg.lstsq(images, target[:, None]).solution.reshape(1, 6, 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_of_the_grouped_form_is_recovered() -> None:
    first = torch.randn(1, 8, 3, dtype=torch.float64)
    second = 0.3 * torch.randn(1, 8, 2, dtype=torch.float64)
    group = Problem(block_diagonal.compose(first, second, 4), problem(1, 8, 12).second)
    solution = block_diagonal.solve(group, 4, rounds=500, tol=0, cg_steps=30)
    assert solution.history[-1] < 0.05 * solution.history[0]


def test_interleave_only_form_is_solved_exactly() -> None:
    first = torch.randn(1, 12, 2, dtype=torch.float64)
    group = Problem(block_diagonal.compose(first, None, 4), problem(1, 12, 8).second)
    solution = block_diagonal.solve(group, 4)
    assert solution.second is None
    torch.testing.assert_close(solution.first, first, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("second", [False, True])
def test_free_channels_find_a_planted_order(second: bool) -> None:
    first = torch.randn(1, 8, 3, dtype=torch.float64) + 1
    later = torch.zeros(1, 8, 2, dtype=torch.float64) if second else None
    dense = block_diagonal.compose(first, later, 4)
    columns, rows = torch.randperm(12), torch.randperm(8)
    group = Problem(dense[:, rows][:, :, columns])
    fixed = block_diagonal.solve(group, 4, second=second)
    free = block_diagonal.solve(group, 4, second=second, free_inputs=True, free_outputs=True)
    assert float(free.errors) < 0.5 * float(fixed.errors)
    assert free.input_order is not None and free.output_order is not None
    reordered = group.weights[:, free.output_order[0]][:, :, free.input_order[0]]
    gap = (reordered - free.approximation).square().sum() / reordered.square().sum()
    assert float(gap) == pytest.approx(float(free.errors), rel=1e-6, abs=1e-9)
    assert fixed.input_order is None and fixed.output_order is None


def test_refusals() -> None:
    with pytest.raises(SharefoldError, match="divide"):
        block_diagonal.solve(problem(1, 8, 12), 3)
    with pytest.raises(SharefoldError, match="1x1"):
        block_diagonal.solve(problem(1, 8, 18, kernel=(3, 3)), 2)
