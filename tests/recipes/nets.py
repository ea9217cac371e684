"""Networks with random weights and BatchNorms that do something, and conversion of them by a recipe."""

from __future__ import annotations

import copy

import timm
import torch
import torchvision
from networks import made_once, narrow_cifar_resnet
from timm.models import efficientnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import sharefold.models  # noqa: F401  (registers the CIFAR networks)
from sharefold.convert import Conversion, convert_
from sharefold.plans import Plan
from sharefold.recipes import build_plan

CASES = [
    "sharesnet",
    "kernel-sharing",
    "filter-bases:shared=4",
    "filter-bases:shared=0,unique=4",
    "filter-bases:tie=3x3",
    "layer-reuse",
    "grouped-pointwise:min_channels=8",
    "grouped-pointwise:min_channels=8,type=1",
    "grouped-pointwise:min_channels=8,type=3",
]


def build(source: str, **kwargs: object) -> nn.Module:
    library, name = source.split(":")
    if library == "tv":
        return torchvision.models.get_model(name, weights=None, **kwargs)
    return timm.create_model(name, **kwargs)


class NarrowResNet(ResNet):
    """torchvision's ResNet with three blocks a stage and a sixteenth of the width, so that its solvers take no time."""

    def __init__(self, block: type[BasicBlock] | type[Bottleneck]) -> None:
        super().__init__(block, [3, 3, 3, 3])
        self.fc = nn.Linear(self.fc.in_features // 16, 10)

    def _make_layer(self, block: type, planes: int, *rest: int, **named: object) -> nn.Sequential:
        return super()._make_layer(block, planes // 16, *rest, **named)


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters that no identity hides; in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def settled(model: nn.Module, size: int) -> nn.Module:
    """Like :func:`randomise`, with running statistics of the network's own maps, so that deep ones stay bounded."""
    randomise(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()(torch.randn(16, 3, size, size))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def converted(
    model: nn.Module, recipe: str, size: int, images: int = 6, repair: bool = False
) -> tuple[Plan, Conversion]:
    """Converts ``model`` in place on random images of ``size`` pixels; (plan, what was done)."""
    batch = torch.randn(images, 3, size, size)
    plan = build_plan(recipe, model, batch[:1])
    return plan, convert_(model, plan, calibration=batch, repair=repair)


def close(first: Tensor, second: Tensor, rtol: float = 1e-4) -> bool:
    """Whether two outputs agree up to rounding, and are not trivially constant."""
    assert second.std() > 1e-4
    return bool((first - second).abs().max() <= rtol * second.abs().max())


def narrow_efficientnet() -> nn.Module:
    """The first three stages of EfficientNet-B0, in a quarter of the width; those left out are of the same kinds."""
    model = efficientnet._gen_efficientnet("efficientnet_b0", channel_multiplier=0.25, depth_multiplier=0.6, num_classes=10)
    model.blocks = model.blocks[:3]
    last = model.blocks[-1][-1].conv_pwl.out_channels
    model.conv_head = nn.Conv2d(last, model.conv_head.out_channels, 1, bias=False)
    return model


def small(recipe: str) -> tuple[nn.Module, int]:
    """A network that the recipe applies to, and its input size."""
    if recipe.startswith("grouped"):
        return settled(narrow_efficientnet(), 32), 32
    # Ties leave each stage's first block out, and need two others.
    return randomise(narrow_cifar_resnet(3 if "tie" in recipe else 2)), 16


@made_once
def small_converted(recipe: str) -> tuple[nn.Module, nn.Module, Plan, Conversion, int]:
    """Of :func:`small`: the dense network, it converted, the plan, what was done, and the input size."""
    model, size = small(recipe)
    dense = copy.deepcopy(model)
    return dense, model, *converted(model, recipe, size), size
