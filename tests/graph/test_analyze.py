"""What analyze leaves behind (nothing), what it refuses, and what it calls not shareable."""

from __future__ import annotations

import copy
import random
import time

import pytest
import timm
import torch
import torchvision
from torch import Tensor, fx, nn

from sharefold.errors import SharefoldError
from sharefold.graph import analyze, find_groups

from .networks import Branching, Oddities, OptionANet, randomize


def snapshot(model: nn.Module) -> list[tuple[object, ...]]:
    keys = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (name, m.training, sorted(m.__dict__), *(len(getattr(m, key)) for key in keys))
        for name, m in model.named_modules()
    ]


class Caching(nn.Module):
    """Writes on itself in every way a forward can."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.cache: dict[str, int] = {}
        self.maps: dict[str, Tensor] = {"last": torch.zeros(3)}
        self.seen: list[int] = [7]
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.cache["width"] = x.shape[-1]
        self.seen.append(1)
        self.maps["last"] = x
        self.latest = x
        self.steps.add_(1)
        return self.drop(self.conv(x)) + torch.rand(()) + random.random()


@pytest.mark.parametrize(
    "build",
    [
        Branching,
        Caching,
        OptionANet,
        lambda: torchvision.models.mobilenet_v3_small(),
        lambda: timm.create_model("resnet18"),
        lambda: timm.create_model("levit_128s"),
    ],
)
@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_left_as_it_was(build: object, mode: bool) -> None:
    model = randomize(build())  # type: ignore[operator]
    model.train(mode)
    first = next(iter(model.children()))
    first.train(not mode)  # mixed modes must survive
    size = 224 if hasattr(model, "pretrained_cfg") and "levit" in str(model.pretrained_cfg) else 32
    before, state = snapshot(model), copy.deepcopy(model.state_dict())
    seeds = torch.get_rng_state(), random.getstate()
    analyze(model, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3)))
    assert snapshot(model) == before
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert torch.equal(torch.get_rng_state(), seeds[0]) and random.getstate() == seeds[1]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    if isinstance(model, Caching):
        assert model.cache == {} and model.seen == [7] and torch.equal(model.maps["last"], torch.zeros(3))


def test_the_model_is_restored_after_a_failure() -> None:
    model = OptionANet().train()
    before = snapshot(model)
    with pytest.raises(SharefoldError, match=r"^forward pass: OptionANet fails on the example input .*channels"):
        analyze(model, torch.randn(1, 1, 32, 32))
    assert snapshot(model) == before


def test_the_graph_runs_on_the_model_itself() -> None:
    model = randomize(OptionANet()).eval()
    image = torch.randn(2, 3, 32, 32)
    graph = analyze(model, image)
    assert isinstance(graph.fx_graph, fx.Graph)
    with torch.no_grad():
        assert torch.equal(fx.Interpreter(model, graph=graph.fx_graph).run(image), model(image))
    assert not any(isinstance(m, fx.GraphModule) for m in model.modules())


def test_optional_arguments_are_fixed_at_their_defaults() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.other = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor, mask: Tensor | None = None, deep: bool = True, scale: float = 2.0) -> Tensor:
            x = self.conv(x) * scale
            if mask is not None:
                x = x * mask
            return self.other(x) if deep else x

    graph = analyze(Optional(), torch.randn(1, 3, 4, 4))
    assert graph.traced == "fx" and list(graph.layers) == ["conv", "other"]
    assert graph.layers["conv"].private_output
    assert [n.name for n in graph.fx_graph.nodes if n.op == "placeholder"] == ["x"]  # type: ignore[union-attr]
    both = analyze(Optional(), (torch.randn(1, 3, 4, 4), torch.ones(1, 4, 1, 1)))
    assert both.traced == "fx" and not both.layers["conv"].private_output
    named = analyze(Optional(), {"x": torch.randn(1, 3, 4, 4), "deep": False})
    assert named.traced == "hooks" and list(named.layers) == ["conv"] and list(named.skipped) == ["other"]


def test_a_trace_that_lies_is_not_believed() -> None:
    """Python code that ran once at trace time may run otherwise later: outputs are compared."""

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if isinstance(x, fx.Proxy) else self.b(x)

    graph = analyze(Fickle(), torch.randn(1, 3, 4, 4))
    assert graph.traced == "hooks" and list(graph.layers) == ["b"]
    assert graph.trace_note == "the trace calls other layers than the network"


def test_what_is_not_shared_has_a_reason() -> None:
    graph = analyze(Oddities(), torch.randn(2, 3, 8, 8))
    assert graph.traced == "fx", graph.trace_note
    assert list(graph.layers) == ["first", "up", "line", "last"]
    assert graph.skipped == {
        "borrowed": "its weight is also used by other code, outside of the module",
        "embedding": "a parameter of Oddities, not a layer",
        "normed": "its weight is parametrized: remove the parametrization first",
        "tied_a": "its weight is already shared with tied_b",
        "tied_b": "its weight is already shared with tied_a",
        "tokens": "it mixes positions, not channels",
        "unused": "never called as a module: unused, or its weight is used by other code",
    }
    assert not graph.layers["first"].private_output and not graph.layers["last"].private_input


def test_per_sample_weights_and_attention() -> None:
    with torch.device("meta"):
        model = timm.create_model("cc_resnet50" if timm.is_model("cc_resnet50") else "tf_efficientnet_cc_b0_4e")
    graph = analyze(model, torch.empty(1, 3, 64, 64, device="meta"))
    found = [reason for reason in graph.skipped.values() if reason.startswith("CondConv2d: ")]
    assert found and set(found) == {"CondConv2d: its weight is not that of a plain convolution or Linear"}

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0]

    graph = analyze(Attending(), torch.randn(1, 3, 4, 4))
    assert list(graph.layers) == ["conv"] and not graph.layers["conv"].private_output
    assert set(graph.skipped) == {"attention.in_proj_weight", "attention.out_proj"}


def test_bad_input() -> None:
    with pytest.raises(SharefoldError, match=r"str is not an nn\.Module"):
        analyze("resnet18", torch.randn(1, 3, 8, 8))  # type: ignore[arg-type]
    with pytest.raises(SharefoldError, match="lazy modules"):
        analyze(nn.Sequential(nn.LazyConv2d(4, 3)), torch.randn(1, 3, 8, 8))
    graph = analyze(OptionANet(1), torch.randn(1, 3, 32, 32))
    with pytest.raises(SharefoldError, match=r"first_block='none': unknown policy: choose one of shape, stride, skip"):
        find_groups(graph, first_block="none")
    with pytest.raises(SharefoldError, match=r"exclude: .* give a valid regular expression"):
        find_groups(graph, exclude="(")


def test_input_goes_to_the_device_of_the_model() -> None:
    with torch.device("meta"):
        model = OptionANet()
    graph = analyze(model, torch.randn(1, 3, 32, 32))
    real = analyze(OptionANet(), torch.randn(1, 3, 32, 32))
    assert graph.layers == real.layers and graph.spaces == real.spaces and graph.repeats == real.repeats


def test_the_result_does_not_depend_on_batch_or_values() -> None:
    model = randomize(OptionANet())
    first = analyze(model, torch.randn(1, 3, 32, 32))
    second = analyze(model, 5 * torch.randn(4, 3, 32, 32))
    assert first.layers == second.layers and first.spaces == second.spaces
    assert find_groups(first) == find_groups(second)


def test_speed_of_a_common_network() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    image = torch.empty(1, 3, 224, 224, device="meta")
    analyze(model, image)
    start = time.process_time()
    analyze(model, image)
    assert time.process_time() - start < 5.0
