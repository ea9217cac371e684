"""Samples of a layer: inputs and outputs at the same positions, every one with the image that it is of."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from sharefold.calibration.statistics import samples_for
from sharefold.layers import form_of
from sharefold.layers.form import ConvForm
from sharefold.repair import samples as module
from sharefold.repair.samples import Collector, Samples

LAYERS = {
    "plain": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=(1, 2)),
    "stride": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=1),
    "dilation": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2),
    "groups": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(4, 6, 4, padding="same", dilation=2),
    "same by the input": lambda: Conv2dSame(4, 6, 3, stride=2),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2), padding_mode="circular"),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "linear": lambda: nn.Linear(4, 6),
}  # fmt: skip


def form_of_layer(layer: nn.Module) -> ConvForm:
    form = form_of(layer)
    assert form is not None
    return form


def expected(layer: nn.Module, x: Tensor) -> Tensor:
    """(P, O): what the layer makes of its patches (P, G, N), in float64."""
    weight = layer.weight.detach().double().flatten(1).reshape(x.shape[1], -1, x.shape[2])  # type: ignore[union-attr,operator]
    y = torch.einsum("pgn,gon->pgo", x.double(), weight).flatten(1)
    return y if layer.bias is None else y + layer.bias.detach().double()  # type: ignore[union-attr,operator]


@torch.no_grad()
def collected(layer: nn.Module, batches: list[Tensor], positions: int | None = None, images: int | None = None) -> Samples:
    """``batches`` of a layer's inputs; ``images`` are in each, by default as many as it is long."""
    count = sum(len(batch) if images is None else images for batch in batches)
    collector = Collector(form_of_layer(layer), count)
    collector.positions = collector.positions if positions is None else positions
    for batch in batches:
        y = layer(batch)
        collector.add(batch, y, (2 * y, y + 1), images)
    found = collector.samples()
    assert found is not None
    return found


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_the_layers_of_the_inputs_at_every_position(kind: str) -> None:
    layer = LAYERS[kind]()
    shape = (4,) if kind == "linear" else (4, 11, 9)
    batches = [torch.randn(3, *shape), torch.randn(2, *shape)]
    found = collected(layer, batches, positions=7)
    each = 1 if kind == "linear" else 7
    assert found.x.shape[0] == len(found) == 5 * each
    torch.testing.assert_close(found.y.double(), expected(layer, found.x), rtol=1e-4, atol=1e-5)
    assert found.given is not None and found.wanted is not None
    assert torch.equal(found.given, 2 * found.y) and torch.equal(found.wanted, found.y + 1)
    assert torch.equal(found.image, torch.arange(5).repeat_interleave(each))


@pytest.mark.parametrize("kind", LAYERS)
def test_all_positions_where_that_are_few(kind: str) -> None:
    layer = LAYERS[kind]()
    x = torch.randn(2, 6, 5, 4) if kind == "linear" else torch.randn(2, 4, 11, 9)
    y = layer(x).detach()
    rows = y.reshape(-1, 6) if kind == "linear" else y.permute(0, 2, 3, 1).flatten(0, 2)
    found = collected(layer, [x])
    torch.testing.assert_close(found.y, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.y.double(), expected(layer, found.x), rtol=1e-4, atol=1e-5)


def marked(images: int, *shape: int) -> Tensor:
    """Inputs whose entries are their image's number."""
    return torch.arange(images).float().reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()


def of_images(found: Samples) -> Tensor:
    return found.x.flatten(1).amax(1).round().long()


@pytest.mark.parametrize("positions", [3, 100])
def test_parts_of_images_belong_to_their_images(positions: int) -> None:
    """Windows (Swin) and flattened tokens lie one after another, tokens first (CLIP) across."""
    layer, tokens = nn.Linear(4, 6), marked(5, 12, 4)
    windows, flat, first = tokens.reshape(20, 3, 4), tokens.reshape(60, 4), tokens.transpose(0, 1)
    for x in (tokens, windows, flat, first):
        found = collected(layer, [x], positions, images=5)
        assert len(found) == 5 * min(positions, 12)
        assert torch.equal(of_images(found), found.image)
        torch.testing.assert_close(found.y.double(), expected(layer, found.x), rtol=1e-4, atol=1e-5)
    conv = nn.Conv2d(4, 6, 1)
    frames = marked(5, 4, 4, 6, 6).flatten(0, 1)
    found = collected(conv, [frames, frames + 5], 8, images=5)
    assert torch.equal(of_images(found), found.image) and len(found) == 10 * 8
    torch.testing.assert_close(found.y.double(), expected(conv, found.x), rtol=1e-4, atol=1e-5)


def test_samples_of_some_images_and_no_others() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    found = collected(layer, [marked(4, 4, 5, 5), marked(3, 4, 5, 5) + 4], positions=6)
    some = found.of(torch.tensor([5, 2]))
    assert len(some) == 12 and some.image.unique().tolist() == [2, 5] and of_images(some).unique().tolist() == [2, 5]
    assert some.given is not None and torch.equal(some.given, 2 * some.y)
    even = found.at(found.image % 2 == 0)  # the halves of cross-validation
    odd = found.at(found.image % 2 == 1)
    assert not set(of_images(even).tolist()) & set(of_images(odd).tolist()) and len(even) + len(odd) == len(found)
    assert len(found.of(torch.arange(0))) == 0


def test_they_fit_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2)
    whole = collected(layer, [torch.randn(8, 4, 12, 12)])
    assert len(whole) == 8 * 144
    monkeypatch.setattr(module, "MEMORY_BYTES", 20_000)
    found = collected(layer, [torch.randn(8, 4, 12, 12)])
    size = 4 * sum(part.numel() for part in (found.x, found.y, found.given, found.wanted) if part is not None)
    assert 15_000 < size <= 20_000


def test_nothing_and_what_is_not_finite_give_none() -> None:
    layer = nn.Linear(4, 6)
    form = form_of_layer(layer)
    assert Collector(form, 3).samples() is None
    for spoiled in range(3):
        parts = [torch.randn(3, 4), torch.randn(3, 6), torch.randn(3, 6)]
        parts[spoiled][1, 2] = float("inf")
        collector = Collector(form, 3)
        collector.add(parts[0], parts[1], (parts[2], parts[1]))
        assert collector.samples() is None


def test_grouped_layers_need_fewer_positions() -> None:
    """Their groups are problems of a few features each."""
    whole, depthwise, wide = nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(256, 256, 3)
    assert [samples_for(form_of_layer(layer)) for layer in (whole, depthwise, wide)] == [16_384, 2048, 16 * 2304]
    assert Collector(form_of_layer(depthwise), 512).positions == module.MORE * 2048 // 512
