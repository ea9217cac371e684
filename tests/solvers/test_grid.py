from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers.data_norm import Problem
from sharefold.solvers.grid import kmeans_codebook, pack, round_to_grid, search_scale, unpack

from .problems import moments


def error(weights: torch.Tensor, approx: torch.Tensor, second: torch.Tensor) -> float:
    return float(Problem(weights[None], second[None]).errors(approx[None]))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("deficient", [False, True])
def test_compensation_beats_nearest(bits: int, deficient: bool) -> None:
    nearest, compensated = 0.0, 0.0
    for seed in range(5):
        weights = torch.randn(16, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        second = moments(1, 150, deficient, seed)[0]
        for method in ("nearest", "compensated"):
            rounded = round_to_grid(weights, bits, second, method=method)
            top = 2 ** (bits - 1) - 1
            assert rounded.codes.dtype == torch.int8 and int(rounded.codes.abs().max()) <= top
            value = error(weights, rounded.weight, second)
            nearest, compensated = nearest + value * (method == "nearest"), compensated + value * (method != "nearest")
    assert compensated < 0.8 * nearest


def test_compensation_with_identity_moments_is_nearest() -> None:
    weights = torch.randn(8, 20, dtype=torch.float64)
    identity = torch.eye(20, dtype=torch.float64)
    assert torch.equal(round_to_grid(weights, 4, identity).codes, round_to_grid(weights, 4).codes)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, second = torch.randn(4, 40, dtype=torch.float64), moments(1, 40)[0]
    whole = round_to_grid(weights, 4, second).codes
    monkeypatch.setattr("sharefold.solvers.grid.BLOCK", 7)
    assert torch.equal(round_to_grid(weights, 4, second).codes, whole)


def test_grid_points_are_kept_and_dead_inputs_are_harmless() -> None:
    codes = torch.randint(-7, 8, (5, 12))
    codes[:, 0] = 7
    scale = torch.rand(5) + 0.5
    weights = scale[:, None] * codes
    assert torch.equal(round_to_grid(weights, 4, row_scale=scale).codes, codes.to(torch.int8))
    assert torch.equal(round_to_grid(weights, 4, moments(1, 12)[0].float(), scale).codes, codes.to(torch.int8))
    dead = round_to_grid(weights, 4, torch.zeros(12, 12))
    assert torch.isfinite(dead.weight).all()
    assert torch.equal(round_to_grid(torch.zeros(2, 3), 4).weight, torch.zeros(2, 3))


def test_scale_search_beats_the_peak() -> None:
    weights = torch.randn(16, 400, dtype=torch.float64)
    scale = search_scale(weights, 3)
    peak = weights.abs().amax(1) / 3
    loss = [(weights - s[:, None] * (weights / s[:, None]).round().clamp(-3, 3)).square().sum(1) for s in (scale, peak)]
    assert (loss[0] <= loss[1]).all() and float(loss[0].sum()) < 0.7 * float(loss[1].sum())


def test_scalar_codebook() -> None:
    values = torch.cat([torch.full((50,), v) + 0.01 * torch.randn(50) for v in (-1.0, 0.2, 0.5, 3.0)])
    codes, codebook = kmeans_codebook(values, 2)
    torch.testing.assert_close(codebook, torch.tensor([-1.0, 0.2, 0.5, 3.0]), atol=0.02, rtol=0)
    assert (codebook[codes] - values).abs().max() < 0.1
    normal = torch.randn(100_000, dtype=torch.float64)
    codes, codebook = kmeans_codebook(normal, 2)
    # Lloyd-Max quantiser of a unit normal at 2 bits: distortion 0.1175 (Max 1960, table I).
    assert float((codebook[codes] - normal).square().mean()) == pytest.approx(0.1175, rel=0.02)
    codes, codebook = kmeans_codebook(torch.tensor([1.0, 1.0, 2.0]), 4)
    assert torch.equal(codebook[codes], torch.tensor([1.0, 1.0, 2.0]))


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 16), data=st.data())
def test_packing_round_trips(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(torch.tensor(values, dtype=torch.int64), bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-len(values) * bits // 8)
    assert unpack(packed, bits, len(values)).tolist() == values


def test_refusals() -> None:
    with pytest.raises(SharefoldError, match="do not fit 3 bits"):
        pack(torch.tensor([8]), 3)
    with pytest.raises(SharefoldError, match="cannot hold"):
        unpack(torch.zeros(2, dtype=torch.uint8), 5, 4)
    with pytest.raises(SharefoldError, match="2 to 8"):
        round_to_grid(torch.randn(2, 3), 1)
    with pytest.raises(SharefoldError, match="method"):
        round_to_grid(torch.randn(2, 3), 4, method="stochastic")
    with pytest.raises(SharefoldError, match="moments"):
        round_to_grid(torch.randn(2, 3), 4, torch.eye(4))
