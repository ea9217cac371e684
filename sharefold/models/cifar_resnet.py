"""ResNet for CIFAR (6n+2 layers, option-A shortcuts): ``resnet{20,32,44,56,110}_cifar``.

Paper: He et al., "Deep Residual Learning for Image Recognition", section 4.2, https://arxiv.org/abs/1512.03385.
Parameter names follow the public weights of https://github.com/akamaster/pytorch_resnet_cifar10 (BSD-2-Clause),
which load unchanged. What differs from that repository: timm's interface (any class count, input channels, pooling)
and global pooling instead of a fixed window, which is the same thing at 32 x 32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sharefold.models._base import CifarNet, cifar_cfg, init_he, unwrap_checkpoint

__all__ = ["CifarResNet"]


class PadShortcut(nn.Module):
    """Option-A shortcut: drop every other pixel, fill up with zero channels on both sides; no parameters."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_chans - in_chans) // 2
        self.pad = (0, 0, 0, 0, before, out_chans - in_chans - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, out_chans, ceil(H / stride), ceil(W / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.pad)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, around an addition; ReLU after it."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.act2 = nn.ReLU()
        changes = stride != 1 or in_chans != out_chans
        self.shortcut = PadShortcut(in_chans, out_chans, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))


class CifarResNet(CifarNet):
    """3x3 stem of 16 channels and three stages of ``blocks`` basic blocks, 16, 32 and 64 channels wide.

    Input (N, in_chans, H, W), output (N, num_classes) logits; trained at 32 x 32.
    """

    classifier_name = "linear"

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act1 = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"layer{number}"}
            for number, width, reduction in ((1, 16, 1), (2, 32, 2), (3, 64, 4))
        ]
        self.build_head(64, num_classes, global_pool, drop_rate)
        init_he(self)

    @staticmethod
    def _stage(in_chans: int, out_chans: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_chans, out_chans, stride)
        return nn.Sequential(first, *(BasicBlock(out_chans, out_chans, 1) for _ in range(blocks - 1)))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 64, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


_PUBLIC = "https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/"


def _cfg(file: str) -> dict[str, Any]:
    return cifar_cfg(_PUBLIC + file, classifier="linear", license="bsd-2-clause")


default_cfgs = generate_default_cfgs(
    {
        "resnet20_cifar.cifar10": _cfg("resnet20-12fca82f.th"),
        "resnet32_cifar.cifar10": _cfg("resnet32-d509ac18.th"),
        "resnet44_cifar.cifar10": _cfg("resnet44-014dd654.th"),
        "resnet56_cifar.cifar10": _cfg("resnet56-4bfd9763.th"),
        "resnet110_cifar.cifar10": _cfg("resnet110-1d1ed7c2.th"),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet,
        variant,
        pretrained,
        pretrained_filter_fn=unwrap_checkpoint,
        feature_cfg={"out_indices": (0, 1, 2)},
        **kwargs,
    )


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for CIFAR, 269,722 parameters at 10 classes."""
    return _create("resnet20_cifar", pretrained, blocks=3, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for CIFAR, 464,154 parameters at 10 classes."""
    return _create("resnet32_cifar", pretrained, blocks=5, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for CIFAR, 658,586 parameters at 10 classes."""
    return _create("resnet44_cifar", pretrained, blocks=7, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for CIFAR, 853,018 parameters at 10 classes."""
    return _create("resnet56_cifar", pretrained, blocks=9, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for CIFAR, 1,727,962 parameters at 10 classes."""
    return _create("resnet110_cifar", pretrained, blocks=18, **kwargs)
