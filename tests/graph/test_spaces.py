"""Channel spaces: permuting what a private space names must leave the network's output unchanged."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sharefold.graph import NetworkGraph, Space, analyze

from .networks import OptionANet, randomize


def permute_space(model: nn.Module, space: Space, order: Tensor) -> None:
    """Applies one permutation to every tensor that carries the channels of ``space``."""
    with torch.no_grad():
        for name in space.writers:
            module: Any = model.get_submodule(name)
            for key in ("weight", "bias", "gain"):
                tensor = getattr(module, key, None)
                if tensor is not None:
                    tensor.copy_(tensor[order].clone())
        for name in space.through:
            module = model.get_submodule(name)
            for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                if tensor.dim() and len(tensor) == space.channels:
                    tensor.copy_(tensor[order].clone())
        for name in space.readers:
            weight: Any = model.get_submodule(name).weight
            weight.copy_(weight[:, order].clone())


def plain() -> nn.Module:
    """Convolutions and poolings in a row; the last map is flattened with its positions."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 12), (12, 12)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * 25, 16), nn.ReLU(), nn.Linear(16, 5))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "option_a": (OptionANet, 5),
    "basic": (lambda: torchvision.models.resnet18(num_classes=5), 8),
    "bottleneck": (lambda: timm.create_model("resnet26", num_classes=5), 17),
    "inverted": (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.25), 18),
    "gated": (lambda: timm.create_model("efficientnet_b0", num_classes=5), 16),
    "norm_free": (lambda: timm.create_model("nf_resnet26", num_classes=5), 17),
    "channels_last": (lambda: timm.create_model("convnext_atto", num_classes=5), 12),
    "mixer": (lambda: timm.models.convmixer.ConvMixer(32, 4, num_classes=5), 5),
    "dense": (lambda: timm.create_model("densenet121", num_classes=5, block_config=(2, 2, 2), growth_rate=8), 6),
    "plain": (plain, 3),
    "concatenating": (lambda: torchvision.models.squeezenet1_1(num_classes=5), 9),
    "shuffling": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=5), 8),
    "grouped": (lambda: timm.create_model("regnetx_002", num_classes=5), 1),
}


def output_change(model: nn.Module, graph: NetworkGraph, spaces: list[Space], image: Tensor) -> float:
    """Relative change of the output after permuting ``spaces`` one by one."""
    with torch.no_grad():
        before = model(image)
        for space in spaces:
            permute_space(model, space, torch.randperm(space.channels, generator=torch.Generator().manual_seed(1)))
        return float((model(image) - before).norm() / before.norm())


@pytest.mark.parametrize("name", list(NETWORKS))
def test_private_spaces_can_be_permuted(name: str) -> None:
    build, least = NETWORKS[name]
    model = randomize(build()).eval().double()
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    graph = analyze(model, image)
    private = [space for space in graph.spaces.values() if space.private]
    assert len(private) >= least
    flagged = {r.output_space for r in graph.layers.values() if r.private_output}
    assert flagged == {space.id for space in private}
    assert output_change(model, graph, private, image) < 1e-9


@pytest.mark.parametrize("name", ["basic", "bottleneck", "gated", "dense"])
def test_incomplete_permutations_do_change_the_output(name: str) -> None:
    """The check above can fail: one forgotten tensor shows."""
    model = randomize(NETWORKS[name][0]()).eval().double()
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    graph = analyze(model, image)
    private = [s for s in graph.spaces.values() if s.private and s.through]
    for space in private[:: max(1, len(private) // 4)]:
        partial = dataclasses.replace(space, through=())
        assert output_change(copy.deepcopy(model), graph, [partial], image) > 1e-6


@pytest.mark.parametrize("name", ["basic", "bottleneck", "inverted", "gated", "norm_free", "mixer"])
def test_unfrozen_streams_can_be_permuted_as_a_whole(name: str) -> None:
    """Spaces with several writers, gates included, name every tensor too."""
    model = randomize(NETWORKS[name][0]()).eval().double()
    image = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    graph = analyze(model, image)
    shared = [s for s in graph.spaces.values() if not s.frozen and len(s.writers) > 1]
    if name != "mixer":
        assert shared
    assert output_change(model, graph, shared, image) < 1e-9


class Sandwich(nn.Module):
    """conv -> function under test -> conv; the space in between is what the tests look at."""

    def __init__(self, middle: Callable[[Tensor], Tensor], inputs: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.other = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(inputs, 4, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "relu in place": lambda x: F.relu_(x),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "spatial pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(1, -1).transpose(-1, 1),
    "flatten positions": lambda x: x.flatten(2).unflatten(2, (6, 6)),
    "spatial slice": lambda x: x[:, :, ::2, 1:],
    "ellipsis": lambda x: x[..., 1:],
    "new axis": lambda x: x[:, None].squeeze(1),
    "softmax over channels": lambda x: x.softmax(1),
    "channel attention without weights": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "spatial attention": lambda x: x * torch.sigmoid(x.mean(1, keepdim=True)),
    "spatial attention by max": lambda x: x * x.max(1, keepdim=True)[0],
    "values of max": lambda x: x * x.max(1, keepdim=True).values,
    "norm over channels": lambda x: F.normalize(x, dim=1),
    "split positions": lambda x: x.chunk(2, 2)[0],
    "concatenate positions": lambda x: torch.cat([x, x], dim=3),
    "stacked sum": lambda x: torch.stack([x, x.relu()]).sum(0),
    "roll positions": lambda x: torch.roll(x, (1, 1), dims=(2, 3)),
    "scalar arithmetic": lambda x: 2 * x - 1 + x / 3,
    "maximum": lambda x: torch.maximum(x, -x),
    "expand": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6),
}

FREEZING: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "channel slice": (lambda x: x[:, :4], 4),
    "channel pad": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10),
    "concatenate channels": (lambda x: torch.cat([x, x], dim=1), 16),
    "chunk channels": (lambda x: x.chunk(2, dim=1)[0], 4),
    "shuffle": (lambda x: x.view(-1, 2, 4, 6, 6).transpose(1, 2).reshape(-1, 8, 6, 6), 8),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), 2),
    "flip channels": (lambda x: x.flip(1), 8),
    "roll channels": (lambda x: torch.roll(x, 1, dims=1), 8),
    "constant per channel": (lambda x: x + torch.arange(8).view(1, 8, 1, 1), 8),
    "swapped axes meet": (lambda x: F.pad(x, (1, 1, 1, 1)) + F.pad(x, (1, 1, 1, 1)).transpose(1, 3), 8),
    "unknown function": (lambda x: torch.cumsum(x, dim=1), 8),
    "matrix product": (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(8)), 8),
    "indices of max": (lambda x: x + x.max(1, keepdim=True)[1], 8),
    "both of max": (lambda x: x + (found := torch.max(x, 1, keepdim=True))[0] * found[-1], 8),
    "values and indices": (lambda x: x + (found := x.max(1, keepdim=True)).values * found.indices, 8),
    "windows across channels": (lambda x: x / F.avg_pool3d(x.square()[:, None], (5, 1, 1), 1, (2, 0, 0))[:, 0], 8),
    "pooled with channels last": (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 3, 1, 1).permute(0, 3, 1, 2), 8),
    "upsampled along channels": (lambda x: F.interpolate(x[:, None], size=(8, 12, 12))[:, 0], 8),
    "flatten all": (lambda x: x.flatten(1)[:, :, None, None], 288),
}


@pytest.mark.parametrize("name", list(KEEPING))
def test_operations_that_keep_channels(name: str) -> None:
    model = randomize(Sandwich(KEEPING[name])).eval().double()
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = analyze(model, image)
    assert graph.traced == "fx", graph.trace_note
    assert graph.layers["first"].private_output and graph.layers["last"].private_input, graph.spaces
    assert output_change(model, graph, [graph.spaces[graph.layers["first"].output_space]], image) < 1e-9


@pytest.mark.parametrize("name", list(FREEZING))
def test_operations_that_look_at_the_order_of_channels(name: str) -> None:
    middle, inputs = FREEZING[name]
    graph = analyze(Sandwich(middle, inputs), torch.randn(2, 3, 6, 6))
    assert graph.traced == "fx", graph.trace_note
    space = graph.spaces[graph.layers["first"].output_space]
    assert space.frozen and space.reason
    assert not graph.layers["first"].private_output and not graph.layers["last"].private_input


class Reader(nn.Module):
    """Adds what ``way`` makes of the order of the channels."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.features, self.kept = way, torch.zeros(()), [torch.zeros(())]
        self.within: list[Any] = []
        self.within.append(self.within)
        self.rnn, self.attention = nn.LSTM(8, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.pool = nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0)) if way == "pool" else nn.Identity()
        if way == "hook":
            self.pool.register_forward_hook(lambda module, args, output: output.flip(1))
        if way == "pre-hook":
            self.pool.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "lstm":
            return x + self.rnn(x.mean(2).transpose(1, 2))[0].mean(1)[:, :, None, None]
        if self.way == "attention":
            tokens = x.flatten(2).transpose(1, 2)
            return x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).unflatten(2, (6, 6))
        if self.way == "attribute":
            self.features = x
        if self.way == "list":
            self.kept = [x]
        return self.pool(x[:, None])[:, 0] if self.way == "pool" else self.pool(x)


@pytest.mark.parametrize("way", ["lstm", "attention", "attribute", "list", "pool", "hook", "pre-hook", "nothing"])
def test_readers_that_return_no_plain_tensors_and_onlookers_freeze(way: str) -> None:
    model = Sandwich(Reader(way)).eval()
    graph = analyze(model, torch.randn(2, 3, 6, 6))
    assert graph.traced == "fx", graph.trace_note
    assert graph.layers["first"].private_output is (way == "nothing")
    assert isinstance(model.get_submodule("middle").features, Tensor)


def test_maps_that_come_out_within_an_object_freeze() -> None:
    @dataclasses.dataclass
    class Output:
        logits: Tensor
        seen: Tensor

    class Net(Sandwich):
        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return Output(self.last(x.relu()), x)

    graph = analyze(Net(nn.Identity()), torch.randn(2, 3, 6, 6))
    space = graph.spaces[graph.layers["first"].output_space]
    assert graph.traced == "fx" and space.frozen


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.gate = nn.Conv2d(3, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y = y * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(y) + self.head(self.c(x))


def test_sums_unite_and_gates_do_not_make_a_stream() -> None:
    graph = analyze(Sums(), torch.randn(1, 3, 6, 6))
    space = graph.spaces[graph.layers["head"].input_space]
    # the two calls of the head tie what it reads
    assert set(space.writers) == {"a", "b", "c", "gate"} and space.gates == ("gate",)
    assert space.stream and not space.private and not space.frozen
    assert graph.layers["head"].calls == 2 and graph.layers["head"].reads_stream
    assert graph.spaces[graph.layers["head"].output_space].reason == "an output of the model"
    assert graph.spaces[graph.layers["a"].input_space].reason == "the input of the model"


def test_free_parameters_per_channel_freeze() -> None:
    class Scaled(Sandwich):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.gamma = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x) * self.gamma)

    graph = analyze(Scaled(), torch.randn(1, 3, 6, 6))
    assert not graph.layers["first"].private_output
    assert "gamma" in graph.spaces[graph.layers["first"].output_space].reason


@pytest.mark.parametrize(
    ("norm", "private"),
    [
        (nn.BatchNorm2d(8), True),
        (nn.InstanceNorm2d(8, affine=True), True),
        (nn.GroupNorm(1, 8), True),
        (nn.GroupNorm(2, 8), False),
        (nn.PReLU(8), True),
        (nn.LayerNorm([8, 6, 6]), False),
        (nn.LocalResponseNorm(3), False),
        (timm.layers.BatchNormAct2d(8), True),
        (timm.layers.LayerNorm2d(8), True),
        (torchvision.ops.FrozenBatchNorm2d(8), True),
        (nn.GLU(1), False),
        (nn.Dropout2d(0.5), True),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), True),
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), False),
    ],
)
def test_modules_between_layers(norm: nn.Module, private: bool) -> None:
    class Net(Sandwich):
        def __init__(self) -> None:
            super().__init__(nn.Identity(), 4 if isinstance(norm, nn.GLU) else 8)
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.first(x)))

    model = randomize(Net()).eval().double()
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = analyze(model, image)
    assert graph.layers["first"].private_output is private
    if private:
        assert output_change(model, graph, [graph.spaces[graph.layers["first"].output_space]], image) < 1e-9
    is_batch_norm = isinstance(norm, nn.BatchNorm2d | torchvision.ops.FrozenBatchNorm2d)
    assert graph.layers["first"].norm == ("norm" if is_batch_norm else None)
