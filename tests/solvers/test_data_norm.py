from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers.data_norm import Problem, Window, eigen_psd, sample_patches, solve_psd

from .problems import moments, problem, sqrt_psd


def unfolded(x: torch.Tensor, kernel, stride, padding, dilation, groups: int) -> torch.Tensor:
    columns = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)
    images, width, length = columns.shape
    return columns.transpose(1, 2).reshape(images, length, groups, width // groups)


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
)
def test_all_positions_equal_unfold(kernel, stride, padding, dilation, groups) -> None:
    x = torch.randn(2, 4, 7, 9)
    expected = unfolded(x, kernel, stride, padding, dilation, groups)
    got = sample_patches(x, Window(kernel, stride, padding, dilation, groups))
    assert torch.equal(got.reshape(expected.shape), expected)


def test_sampled_patches_are_distinct_patches_of_their_image() -> None:
    x = torch.randn(3, 4, 8, 8)
    full = unfolded(x, 3, 2, 1, 1, 2)
    got = sample_patches(x, Window(3, 2, 1, 1, 2), positions=5, generator=torch.Generator().manual_seed(3))
    got = got.reshape(3, 5, 2, -1)
    for image in range(3):
        hits = [int((full[image] == patch).all(-1).all(-1).nonzero()[0, 0]) for patch in got[image]]
        assert len(set(hits)) == 5


@pytest.mark.parametrize("positions", [None, 5])
@pytest.mark.parametrize("window", [Window(3, 2, 1, 1, 2), Window((1, 3), 1, (0, 2), 2), Window(1)], ids=str)
def test_the_order_of_channels_in_memory_changes_nothing(window: Window, positions: int | None) -> None:
    x = torch.randn(3, 4, 8, 9)
    draws = [
        sample_patches(given, window, positions, torch.Generator().manual_seed(3))
        for given in (x, x.to(memory_format=torch.channels_last))
    ]
    assert torch.equal(*draws)


def test_sampling_is_repeatable() -> None:
    x = torch.randn(2, 3, 8, 8)
    draws = [sample_patches(x, Window(3), positions=4, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_same_padding_and_four_amounts(kernel: int) -> None:
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(5, 3, kernel, kernel)
    expected = F.conv2d(x, weight, padding="same").flatten(2).transpose(1, 2).reshape(-1, 5)
    total = kernel - 1
    amounts = (total // 2, total - total // 2, total // 2, total - total // 2)
    for padding in ("same", amounts):
        got = sample_patches(x, Window(kernel, padding=padding)).squeeze(1) @ weight.flatten(1).T
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
def test_padding_modes_match_conv(mode: str) -> None:
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, bias=False)
    x = torch.randn(2, 3, 5, 5)
    got = sample_patches(x, Window(3, padding=1, padding_mode=mode)).squeeze(1) @ conv.weight.flatten(1).T
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 4)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_linear_rows() -> None:
    x = torch.randn(2, 5, 7, 3)
    assert torch.equal(sample_patches(x, None).reshape(x.shape), x)
    assert sample_patches(x, None, positions=4).shape == (8, 1, 3)
    assert sample_patches(torch.randn(6, 3), None, positions=4).shape == (6, 1, 3)


def test_bad_geometry_is_refused() -> None:
    with pytest.raises(SharefoldError, match="does not fit"):
        sample_patches(torch.randn(1, 2, 2, 2), Window(3))
    with pytest.raises(SharefoldError, match="padding"):
        sample_patches(torch.randn(1, 2, 4, 4), Window(3, padding="full"))


def test_errors_are_relative_output_errors() -> None:
    x = torch.randn(200, 8, dtype=torch.float64)
    weights, approx = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    row_weights = torch.rand(1, 5, dtype=torch.float64)
    group = Problem(weights, (x.T @ x / 200)[None], row_weights)
    out, gap = x @ weights[0].T, x @ (weights - approx)[0].T
    expected = (gap.square() * row_weights).sum() / (out.square() * row_weights).sum()
    torch.testing.assert_close(group.errors(approx)[0], expected)
    assert group.error_sum(approx) == pytest.approx(float(expected))
    assert float(group.errors(weights)) == 0


def test_silent_layer_has_no_error() -> None:
    group = problem()
    group = Problem(group.weights, group.second * torch.tensor([1.0, 0, 1])[:, None, None])
    assert float(group.errors(torch.zeros_like(group.weights))[1]) == 0
    assert torch.isfinite(group.objective_weights).all()


@pytest.mark.parametrize("deficient", [False, True])
def test_floored_eigenvalues_give_the_matrix_again(deficient: bool) -> None:
    matrix = moments(2, 10, deficient)
    values, vectors = eigen_psd(matrix)
    assert (values >= 1e-10 * values[:, -1:]).all()
    torch.testing.assert_close((vectors * values.unsqueeze(1)) @ vectors.mT, matrix, rtol=1e-6, atol=1e-8 * float(matrix.max()))
    torch.testing.assert_close(sqrt_psd(matrix) @ sqrt_psd(matrix), matrix, rtol=1e-6, atol=1e-8 * float(matrix.max()))
    assert (eigen_psd(torch.zeros(3, 3))[0] > 0).all()


def test_solve_psd_survives_rank_deficiency() -> None:
    matrix = moments(2, 10, deficient=True)
    rhs = matrix @ torch.randn(2, 10, 3, dtype=torch.float64)
    torch.testing.assert_close(matrix @ solve_psd(matrix, rhs), rhs, rtol=1e-5, atol=1e-5 * float(rhs.abs().max()))


def test_problem_checks_shapes() -> None:
    with pytest.raises(SharefoldError, match="moments"):
        Problem(torch.randn(2, 3, 4), torch.randn(2, 4, 5))
    with pytest.raises(SharefoldError, match="kernel"):
        Problem(torch.randn(2, 3, 4), kernel=(3, 3))
