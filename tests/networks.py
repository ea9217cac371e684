"""Small networks of every kind that the main job must take, with lived-in BatchNorms, and images for them.

:func:`net` gives one by kind; :class:`Small` is the plain network of fine-tuning and refinement.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import statistics_of
from sharefold.graph import analyze
from sharefold.models.cifar_resnet import CifarResNet

SIZE = 12
P = ParamSpec("P")
R = TypeVar("R")


def made_once(make: Callable[P, R]) -> Callable[P, R]:
    """``make``, run once in a process for the same arguments; everybody gets a copy. Random numbers are not drawn from."""

    @functools.cache
    def first(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args, **kwargs)

    @functools.wraps(make)
    def copied(*args: P.args, **kwargs: P.kwargs) -> R:
        return copy.deepcopy(first(*args, **kwargs))

    return copied


class Block(nn.Module):
    """Residual block of two convolutions, 3 an axis, of so many groups."""

    def __init__(
        self, width: int, groups: tuple[int, int] = (1, 1), norm: type[nn.Module] = nn.BatchNorm2d,
        conv: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = nn.Conv2d,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = conv(width, width, 3, padding=1, groups=groups[0], bias=False)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1, groups=groups[1], bias=False)
        self.bn2 = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Inverted(nn.Module):
    """MobileNet's block: expand, depthwise, project."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.project, self.bn3 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.depthwise(torch.relu(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(y))


class Next(nn.Module):
    """ConvNeXt's block: depthwise 5x5, LayerNorm, two Linear layers on channels-last maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.fc2(nn.functional.gelu(self.fc1(y))).permute(0, 3, 1, 2)


class Std(nn.Module):
    """Weight-standardised convolutions with GroupNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = StdConv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)
        self.conv2, self.norm2 = StdConv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


class Net(nn.Module):
    """Stem, two stages of equal blocks, classifier. Input (N, 3, 12, 12), output (N, 5)."""

    def __init__(self, block: Callable[[int], nn.Module], width: int = 8, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.stage1 = nn.Sequential(*(block(width) for _ in range(blocks)))
        self.down, self.bn_down = (
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
        )
        self.stage2 = nn.Sequential(*(block(2 * width) for _ in range(blocks)))
        self.fc = nn.Linear(2 * width, 5)
        self.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (0.5,) * 3, "std": (0.25,) * 3}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(torch.relu(self.bn(self.stem(x))))
        x = self.stage2(torch.relu(self.bn_down(self.down(x))))
        return self.fc(x.mean((2, 3)))


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "residual": Block,
    "grouped": lambda width: Block(width, groups=(4, 4)),
    "depthwise": Inverted,
    "convnext": Next,
    "std": Std,
}


class Small(nn.Module):
    """A stem, residual blocks in ``layer1``, dropout and a head. Input (N, 3, any, any), output (N, 4)."""

    def __init__(self, blocks: int = 2, width: int = 8, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = norm(width)
        self.layer1 = nn.Sequential(*(Block(width, norm=norm) for _ in range(blocks)))
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 4)
        self.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(torch.relu(self.bn(self.stem(x))))
        return self.head(self.drop(x.mean((2, 3))))


class Boxes(nn.Module):
    """Returns what detectors return: a dictionary for every image, and no logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": row} for row in self.body(x)]


class Mute(Boxes):
    """Nothing that it or a part of it returns is one tensor for any number of images: it cannot be compared."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(_Rows(body))


class _Rows(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.inner(x))


def images(count: int = 24, seed: int = 1) -> Tensor:
    """Smooth random images of different contrast and colour, (count, 3, 12, 12)."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    contrast, color = torch.rand(count, 1, 1, 1, generator=generator), torch.randn(count, 3, 1, 1, generator=generator)
    return (1 + 3 * contrast) * nn.functional.avg_pool2d(noise, 3, 1, 1) + color


def net(kind: str = "residual", seed: int = 0, **options: int) -> Net:
    """A network in eval mode whose BatchNorms have run on images and whose scales and shifts are not 1 and 0; torch's generator
    is left as after its making. Made once, where torch is told nothing that would show in it, then copied."""
    told = torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu")
    if told or torch.get_default_dtype() != torch.float32 or torch.get_default_device().type != "cpu":
        return _made(kind, seed, **options)
    model, generator = _known(kind, seed, **options)
    torch.manual_seed(seed)
    torch.set_rng_state(generator)
    return copy.deepcopy(model)


@functools.cache
def _known(kind: str, seed: int, **options: int) -> tuple[Net, Tensor]:
    return _made(kind, seed, **options), torch.get_rng_state()


def _made(kind: str, seed: int, **options: int) -> Net:
    torch.manual_seed(seed)
    model = Net(BLOCKS[kind], **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.momentum = None  # running statistics become those of all images below
    with torch.no_grad():
        model.fc.weight.mul_(4)  # predictions that differ from image to image
        for step in range(4):
            model.train()(images(64, 10 + step))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def narrow_cifar_resnet(blocks: int) -> CifarResNet:
    """A CIFAR ResNet of 16, 20 and 24 channels instead of 16, 32 and 64."""
    model = CifarResNet(blocks=blocks)
    model.layer2, model.layer3 = CifarResNet._stage(16, 20, blocks, 2), CifarResNet._stage(20, 24, blocks, 2)
    model.linear = nn.Linear(24, 10)
    return model


@torch.no_grad()
def trained_like(model: nn.Module, size: int, count: int) -> nn.Module:
    """Norms with scales and statistics as training on ``count`` images leaves them, by torch's own generator."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model.train()(torch.randn(count, 3, size, size))
    return model.eval()


def count(model: nn.Module) -> int:
    """Parameters, shared ones once; `model.parameters()` takes several times as long."""
    found = {p: p.numel() for module in model.modules() for p in module._parameters.values() if p is not None}
    return sum(found.values())


def answers(model: nn.Module, batch: Tensor) -> Tensor:
    """What ``model`` says of ``batch`` in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(batch)


def logits(model: nn.Module, seed: int = 2) -> Tensor:
    """(8, 5) on fixed images."""
    return model.eval()(images(8, seed))


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys and bits."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@made_once
def stage2_problem(kind: str, role: str = "conv", number: int = 16) -> GroupProblem:
    """The layers of ``net(kind)``'s second stage whose name holds ``role``, measured on so many images."""
    model, given = net(kind), images(number)
    graph = analyze(model, given[:1])
    names = [n for n in graph.layers if n.startswith("stage2") and role in n.rpartition(".")[2]]
    return problem_of(model, graph, names, statistics_of(model, graph, given))


class Chain(nn.Module):
    """3x3 convolutions of 8 channels, each with norm and ReLU, then pooling and five classes; every second has ``stride``."""

    def __init__(self, layers: int, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3 if k == 0 else 8, 8, 3, stride=stride if k % 2 else 1, padding=padding) for k in range(layers)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(layers))
        self.head = nn.Linear(8, 5)

    def before(self, x: Tensor) -> Tensor:
        """What happens to the input of every convolution."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(self.before(x))).relu()
        return self.head(x.mean((2, 3)))
