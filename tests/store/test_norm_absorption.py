"""What norms hold goes into the layers in front of them: nothing changes, and files lose two bytes a channel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.layers import StdConv2d
from torch import Tensor, nn

import sharefold
from sharefold.graph import analyze
from sharefold.plans import Plan
from sharefold.store import StoreSpec, TensorSpec, quantize_
from sharefold.store.blob import blob_bytes, decode_blob, encode_blob
from sharefold.store.norm_absorption import absorb_statistics, gains_of, take_up
from sharefold.store.prepare import matrices

from .tiny import Tiny, converted, images, trained


class Reused(nn.Module):
    """Two convolutions in front of one norm, one convolution in front of two, one whose output is also read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.shared, self.read = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4))
        self.one, self.other, self.third, self.last = (nn.BatchNorm2d(8) for _ in range(4))
        self.alone, self.norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.first(x)) + self.one(self.second(x))
        x = self.other(self.shared(x)) + self.third(self.shared(x.relu()))
        between = self.read(x)
        return cast(Tensor, self.norm(self.alone(between + self.last(between))))


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            cast(Tensor, module.running_mean).normal_()
            cast(Tensor, module.running_var).uniform_(0.5, 1.5)
    return model.eval()


def absorbed(model: nn.Module, example: Tensor, original: nn.Module | None = None) -> list[str]:
    """Absorbs everything, without rounding; the tensors whose rows were multiplied."""
    tensors = matrices(model)
    gains = gains_of(model, analyze(model if original is None else original, example), tensors, Plan([], 0, 0))
    with torch.no_grad():
        absorb_statistics(model, Plan([], 0, 0))
        for name, gain in gains.items():
            take_up(model, gain)
            tensors[name].mul_(gain.scale.reshape(-1, *[1] * (tensors[name].dim() - 1)))
    return list(gains)


def test_gains_of_any_sign_go_into_rows() -> None:
    model = lively(Tiny().double())
    with torch.no_grad():
        model.blocks[0].bn1.weight[3] = 0.0
    x = images(4).double()
    before = model(x)
    names = absorbed(model, x[:1])
    assert len(names) == 6 and all(name.startswith("blocks.") for name in names)
    assert float((model(x) - before).abs().max()) < 1e-9 * float(before.abs().max())
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6 and all(bool((norm.weight == 1).all()) for norm in norms)


def test_factored_layers_take_gains_into_their_coefficients() -> None:
    original, model = converted()
    original, model = original.double(), model.double().eval()
    x = images(4).double()
    before = model(x)
    names = absorbed(model, x[:1], original)
    assert sum(name.endswith("coefficients") for name in names) >= 2
    assert float((model(x) - before).abs().max()) < 1e-9 * float(before.abs().max())


def test_norms_and_layers_with_other_readers_are_left_alone() -> None:
    model = lively(Reused().double())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    before = model(x)
    assert absorbed(model, x[:1]) == ["alone.weight"]
    assert float((model(x) - before).abs().max()) < 1e-9 * float(before.abs().max())


class Clamping(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-0.3, 0.3))


class Odd(nn.Module):
    """A layer and a norm behind it, in front of a classifier."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(3, 16, 3, padding=1), layer, norm or nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.norm(self.layer(self.stem(x).relu())).relu().mean((2, 3))))


class Tokens(nn.Module):
    """As many tokens as features, so that the norm's channels are the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(12, 36), nn.BatchNorm1d(36), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.norm(self.layer(x.flatten(1, 2))).relu().mean(1)))


def tied() -> nn.Module:
    """The bias in front of the norm is that of the stem, too."""
    model = Odd(nn.Conv2d(16, 16, 3))
    model.stem.bias = cast(nn.Parameter, model.layer.bias)
    return model


ODD = {
    "standardised": lambda: Odd(StdConv2d(16, 16, 3)),
    "a norm of one's own": lambda: Odd(nn.Conv2d(16, 16, 3, bias=False), Clamping(16)),
    "a bias": lambda: Odd(nn.Conv2d(16, 16, 3)), "a tied bias": tied, "tokens": Tokens,
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_pairs_are_left_alone(kind: str, tmp_path: Path) -> None:
    original = lively(ODD[kind]())
    if kind == "tokens":
        nn.init.uniform_(original.norm.weight, 0.3, 2)
    model, x = copy.deepcopy(original), images(60)
    assert not gains_of(model, analyze(model, x[:1]), matrices(model), Plan([], 0, 0))
    sharefold.convert_(model, Plan([], 0, 0, store="int5"), x)
    found, wanted = model(x), original(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    file = sharefold.save(model, tmp_path / "net.safetensors")
    assert torch.equal(sharefold.load(file, model=copy.deepcopy(original))(x), found)


def test_norms_that_say_nothing_and_those_that_are_excluded() -> None:
    original = lively(Odd(nn.Conv2d(16, 16, 3, bias=False)))
    nn.init.zeros_(original.norm.weight)
    model, x = copy.deepcopy(original), images(60)
    sharefold.convert_(model, Plan([], 0, 0, store="mixed:step=0.002"), x)
    assert torch.allclose(model(x), original(x), atol=1e-2 * float(original(x).abs().max()))
    original = lively(Odd(nn.Conv2d(16, 16, 3, bias=False)))
    for exclude in ("^norm", "^layer", "^stem"):
        model = copy.deepcopy(original)
        sharefold.convert_(model, Plan([], 0, 0, store="int4", exclude=exclude), x)
        kept = {name: tensor for name, tensor in original.state_dict().items() if name.startswith(exclude[1:])}
        assert kept and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
        assert float((model(x) - original(x)).norm() / original(x).norm()) < 0.1


def test_nothing_is_taken_up_where_readers_cannot_be_seen() -> None:
    class Branching(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) > 0 else x.abs())

    model = Branching()
    graph = analyze(model, images(1))
    assert graph.fx_graph is None and gains_of(model, graph, matrices(model), Plan([], 0, 0)) == {}


@pytest.mark.parametrize("text", ["mixed:step=0.01", "int4", "kmeans4"])
def test_rounded_files_hold_no_scales_of_norms(text: str, tmp_path: Path) -> None:
    original, model = converted()
    report = quantize_(model, text, images(), original=original)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert weights and all(bool((weight == 1).all()) for weight in weights)
    file = sharefold.save(model, tmp_path / "net.safetensors")
    assert file.stat().st_size == report.bytes
    loaded = sharefold.load(file, model=trained())
    assert torch.equal(loaded(images()), model(images()))
    again = load_file(sharefold.save(loaded, tmp_path / "again.safetensors"))
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file(file).items())


def test_int8_keeps_what_norms_need_for_training() -> None:
    original, model = converted()
    quantize_(model, "int8", images(), original=original)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(bool((norm.weight != 1).any()) and bool((norm.running_mean != 0).any()) for norm in norms)


def test_halves_that_are_all_the_same_take_one_number() -> None:
    spec = StoreSpec({"a": TensorSpec("fp16"), "b": TensorSpec("fp16")})
    same, other = {"a": torch.full((500,), 0.75), "b": torch.zeros(())}, {"a": torch.arange(500.0), "b": torch.zeros(())}
    assert blob_bytes(other, spec) - blob_bytes(same, spec) >= 990
    found, again = decode_blob(encode_blob(same, spec), same)
    assert torch.equal(found["a"], same["a"]) and torch.equal(found["b"], same["b"])
    # Trained under rounding it stays one of halves.
    assert again.tensors["a"].kind == "fp16"


def test_offsets_are_coded_by_powers_of_two_that_halves_can_hold(tmp_path: Path) -> None:
    original = lively(Tiny(width=24))
    models = [copy.deepcopy(original) for _ in range(2)]
    for model in models:
        sharefold.convert_(model, Plan([], 0, 0), images(), repair=False)
    model = models[0]
    report = quantize_(model, "mixed:step=0.01", images(), original=original)
    state = model.state_dict()
    coded = {name: entry for name, entry in report.spec.tensors.items() if entry.kind == "coded" and name.endswith("bias")}
    assert len(coded) == 7  # of six norms and the stem; the head's seven numbers are too few
    for name, entry in coded.items():
        assert np.log2(entry.top).is_integer() and entry.scales == [0]
        assert torch.equal(state[name], state[name].half().float())
        assert float(state[name].abs().max()) / entry.top < 2048
    file = sharefold.save(model, tmp_path / "net.safetensors")
    assert file.stat().st_size == report.bytes
    assert torch.equal(sharefold.load(file, model=Tiny(width=24))(images()), model(images()))
    assert int(encode_blob(state, report.spec)[0]) == 3  # older readers ask for a newer sharefold
    fine = quantize_(models[1], "mixed:step=0.0001", images(), original=original).spec
    assert all(fine.tensors[name].top < entry.top for name, entry in coded.items())
