from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers.grid import kmeans_codebook, pack, search_scale, unpack


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
        search_scale(torch.randn(2, 3), 1)
