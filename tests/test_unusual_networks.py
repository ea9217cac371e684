"""Networks that torch accepts and that are easily lost: they convert, or one line says why not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import TensorDataset

import sharefold
from sharefold.errors import SharefoldError
from sharefold.export import export
from sharefold.finetune import finetune
from sharefold.measure import agreement, evaluate
from sharefold.plans import Plan

IMAGES = torch.randn(20, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def small(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """A stem, four convolutions of one shape and a classifier, run by ``nn.Sequential``."""
    torch.manual_seed(0)
    body = [part for _ in range(4) for part in (kind(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


class Children(nn.Module):
    """Runs its own children in turn."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(5):
            self.add_module(f"b{index}", nn.Conv2d(8 if index else 3, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x).relu()
        return x.mean((2, 3))


class Grid(nn.Module):
    """Keeps a grid of the size of its last image."""

    size: torch.Size | None = None
    grid = torch.empty(0)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Conv2d(8 if index else 3, 8, 3, padding=1) for index in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x).flatten(2)
        if self.size != x.shape[-2:]:
            self.size, self.grid = x.shape[-2:], torch.arange(y.shape[-1]) * torch.ones(1)
        return y + self.grid


class Masked(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * (weight > 0), bias)


@pytest.mark.parametrize("network", [small, Children], ids=["Sequential", "own loop"])
def test_a_root_that_runs_all_its_children_takes_a_bank(network, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = network().eval()
    plan = sharefold.plan(net, "60%", IMAGES, method="basis")
    assert any(len(group.members) > 1 for group in plan.groups)
    result = sharefold.convert_(net, plan, IMAGES)
    expanded = sharefold.expand(net)
    assert torch.allclose(net(IMAGES), expanded(IMAGES), atol=1e-5)
    assert result.plan.params_after == sum(p.numel() for p in net.parameters())
    sharefold.save(net, tmp_path / "net.safetensors")
    loaded = sharefold.load(tmp_path / "net.safetensors", model=network()).eval()
    assert torch.equal(loaded(IMAGES), net(IMAGES))


def test_export_leaves_what_a_network_keeps_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Grid().eval()
    before = dict(net.__dict__)
    export(net, tmp_path / "grid.pt2", example_input=IMAGES[:2], dynamic_batch=False)
    assert net.__dict__.keys() == before.keys()
    assert net(IMAGES).shape == (20, 8, 144)


@pytest.mark.parametrize("second", ["plan", "convert_"])
def test_a_converted_network_is_not_converted_again(second: str) -> None:
    net = small()
    plan = sharefold.plan(net, "70%", IMAGES, method="basis")
    sharefold.convert_(net, plan, IMAGES, repair=False)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(SharefoldError, match="converted already: plan and convert its original"):
        _ = sharefold.plan(net, "60%", IMAGES) if second == "plan" else sharefold.convert_(net, plan, IMAGES)
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_layers_that_do_more_than_convolve_stay() -> None:
    masked = sharefold.analyze(small(Masked), IMAGES[:1])
    assert [name for name, reason in masked.skipped.items() if "forward of its own" in reason] == ["1", "3", "5", "7"]
    hooked = small()
    calls: list[int] = []
    hooked[3].register_forward_hook(lambda module, inputs, output: calls.append(1))
    sharefold.convert_(hooked, sharefold.plan(hooked, "80%", IMAGES, method="basis"), IMAGES, repair=False)
    calls.clear()
    hooked(IMAGES)
    assert calls == [1]


class Called(nn.Conv2d):
    """Does more than its forward."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


@pytest.mark.parametrize("how", ["call", "instance", "full backward hook", "backward pre-hook"])
def test_layers_with_calls_and_hooks_of_their_own_stay(how: str) -> None:
    net = small()
    if how == "call":
        net = small(Called)
    elif how == "instance":
        net[3].forward = lambda x, plain=net[3].forward: 2 * plain(x)
    elif how == "full backward hook":
        net[3].register_full_backward_hook(lambda module, inputs, outputs: None)
    else:
        net[3].register_full_backward_pre_hook(lambda module, outputs: None)
    skipped = sharefold.analyze(net, IMAGES[:1]).skipped
    words = "backward hook, which a shared layer would not call" if "backward" in how else "a forward of its own"
    assert [name for name, reason in skipped.items() if words in reason] == (["1", "3", "5", "7"] if how == "call" else ["3"])


def test_a_refusal_says_what_cannot_be_shared() -> None:
    torch.manual_seed(0)
    normed = nn.Sequential(
        nn.Conv2d(3, 8, 3), *(weight_norm(nn.Conv2d(8, 8, 3)) for _ in range(3)), nn.Flatten(), nn.Linear(128, 4)
    )
    with pytest.raises(SharefoldError, match="3 x its weight is parametrized"):
        sharefold.plan(normed.eval(), "30%", IMAGES)


def test_parameters_without_a_shape_are_refused() -> None:
    with pytest.raises(SharefoldError, match="lazy modules without shapes: run it once first"):
        sharefold.plan(nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(4)), "50%", IMAGES)


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "calibrate": lambda m: sharefold.calibrate(m, IMAGES), "plan": lambda m: sharefold.plan(m, "50%", IMAGES),
    "convert_": lambda m: sharefold.convert_(m, Plan([], 0, 0), IMAGES), "round_": lambda m: sharefold.round_(m, "int6", IMAGES),
    "agreement": lambda m: agreement(small(), m, IMAGES), "evaluate": lambda m: evaluate(m, [(IMAGES, torch.zeros(20).long())]),
    "export": lambda m: export(m, "net.pt2"), "save": lambda m: sharefold.save(m, "net"),
    "finetune": lambda m: finetune(m, TensorDataset(IMAGES), labels=False, teacher=small()),
    "teacher": lambda m: finetune(small(), TensorDataset(IMAGES), labels=False, teacher=m),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("part", ["", "3", "buffer"])
def test_tensors_without_values_are_refused(verb: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, first = small(), {"": "0.weight", "3": "3.weight", "buffer": "5.mean"}[part]
    if part == "buffer":
        model[5].register_buffer("mean", torch.zeros(3, device="meta"))
    else:
        model.get_submodule(part).to("meta")
    with pytest.raises(SharefoldError, match=rf"{first} is on the meta device and has no values: load them with assign=True"):
        VERBS[verb](model)
    assert not any(tmp_path.iterdir())


def test_graphs_of_networks_without_values_are_read() -> None:
    model = small()
    found = sharefold.analyze(model, IMAGES[:1])
    assert sharefold.analyze(model.to("meta"), IMAGES[:1]).layers == found.layers and len(found.layers) == 6


def test_layers_behind_which_nothing_has_a_derivative_are_still_planned() -> None:
    with pytest.warns((DeprecationWarning, UserWarning)):
        net = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
    plan = sharefold.plan(net, "70%", IMAGES)
    assert plan.groups and plan.params_after <= 0.7 * plan.params_before


def test_a_network_with_a_dynamically_quantised_classifier_is_planned() -> None:
    """Its state dict holds types beside tensors."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 4)).eval()  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    plan = sharefold.plan(quantised, "80%", torch.randn(40, 3, 12, 12))
    assert plan.params_after <= 0.8 * plan.params_before and {m for g in plan.groups for m in g.members} <= {"0", "2"}


class Parts(nn.Module):
    """Blocks whose layers the network calls one by one, or by a method of another name than forward."""

    def __init__(self, make: Callable[[], nn.Module], run: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([make() for _ in range(3)])
        self.head = nn.Linear(8, 5)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.head(x.mean((2, 3)))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def run(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Stage(nn.Module):
    """A block that is called, around one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([Named()])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0].run(x)


def holder() -> nn.Module:
    block = nn.Module()
    block.first, block.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    return block


PARTS = {
    "lists": (lambda: nn.ModuleList(small()[1:5]), lambda b, x: b[2](b[1](b[0](x)))),
    "dictionaries": (lambda: nn.ModuleDict(dict(vars(Named())["_modules"])), lambda b, x: b["second"](b["first"](x).relu())),
    "sequences": (lambda: nn.Sequential(*small()[1:4]), lambda b, x: b[2](b[1](b[0](x)))),
    "methods": (Named, lambda b, x: b.run(x)),
    "holders": (holder, lambda b, x: b.second(b.first(x).relu())),
    "stages": (Stage, lambda b, x: b(x)),
}


@pytest.mark.parametrize("name", PARTS)
def test_blocks_that_are_never_called_themselves(name: str) -> None:
    model = Parts(*PARTS[name]).eval()
    graph = sharefold.analyze(model, IMAGES[:1])
    assert graph.blocks == ([f"blocks.{i}" for i in range(3)] if name == "stages" else []) and len(graph.layers) == 8
    if name == "dictionaries":
        plan = sharefold.plan(model, "70%", IMAGES, method="basis")
        sharefold.convert_(model, plan, IMAGES, refine=1)
        assert sum(p.numel() for p in model.parameters()) == plan.params_after < plan.params_before
