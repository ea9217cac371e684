"""Squeeze-and-excitation ResNet for CIFAR (6n+2 layers): ``se_resnet{14,20,26,38,50,62}_cifar``.

Papers: Hu et al., "Squeeze-and-Excitation Networks", https://arxiv.org/abs/1709.01507; these configurations are the
ones that kernel sharing, https://arxiv.org/abs/2210.14151, was measured on. What differs from the usual CIFAR ResNet:
stages 64, 128 and 256 wide behind a stem of 16, projection shortcuts (1x1 + BatchNorm) where the width changes, and a
gate of two bias-free linear layers (reduction 16) after the second BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sharefold.models._base import CifarNet, cifar_cfg

__all__ = ["SeResNet"]


class ChannelGate(nn.Module):
    """Scale every channel of (N, C, H, W) by a sigmoid of the pooled map."""

    def __init__(self, chans: int, reduction: int = 16) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Linear(chans, chans // reduction, bias=False)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(chans // reduction, chans, bias=False)
        self.gate = nn.Sigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.gate(self.fc2(self.act(self.fc1(self.pool(x).flatten(1)))))
        return x * scale.unsqueeze(-1).unsqueeze(-1)


class SeBasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, channel gate, addition, ReLU."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chans)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.se = ChannelGate(out_chans)
        self.act2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if in_chans != out_chans:
            project = nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(out_chans))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.se(self.bn2(self.conv2(out)))
        return self.act2(out + self.downsample(x))


class SeResNet(CifarNet):
    """3x3 stem of 16 channels and three stages of ``blocks`` blocks, 64, 128 and 256 channels wide.

    Input (N, in_chans, H, W), output (N, num_classes) logits; made for 32 x 32.
    """

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
        self.layer1 = self._stage(16, 64, blocks, stride=1)
        self.layer2 = self._stage(64, 128, blocks, stride=2)
        self.layer3 = self._stage(128, 256, blocks, stride=2)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"layer{number}"}
            for number, width, reduction in ((1, 64, 1), (2, 128, 2), (3, 256, 4))
        ]
        self.build_head(256, num_classes, global_pool, drop_rate)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")

    @staticmethod
    def _stage(in_chans: int, out_chans: int, blocks: int, stride: int) -> nn.Sequential:
        first = SeBasicBlock(in_chans, out_chans, stride)
        return nn.Sequential(first, *(SeBasicBlock(out_chans, out_chans, 1) for _ in range(blocks - 1)))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 256, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


DEPTHS = (14, 20, 26, 38, 50, 62)

default_cfgs = generate_default_cfgs(
    {
        f"se_resnet{depth}_cifar": cifar_cfg(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
        for depth in DEPTHS
    },
)


def _create(depth: int, pretrained: bool, **kwargs: Any) -> SeResNet:
    return build_model_with_cfg(
        SeResNet,
        f"se_resnet{depth}_cifar",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2)},
        blocks=(depth - 2) // 6,
        **kwargs,
    )


@register_model
def se_resnet14_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Two blocks a stage, 2,771,290 parameters at 10 classes."""
    return _create(14, pretrained, **kwargs)


@register_model
def se_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Three blocks a stage, 4,332,122 parameters at 10 classes."""
    return _create(20, pretrained, **kwargs)


@register_model
def se_resnet26_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Four blocks a stage, 5,892,954 parameters at 10 classes."""
    return _create(26, pretrained, **kwargs)


@register_model
def se_resnet38_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Six blocks a stage, 9,014,618 parameters at 10 classes."""
    return _create(38, pretrained, **kwargs)


@register_model
def se_resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Eight blocks a stage, 12,136,282 parameters at 10 classes."""
    return _create(50, pretrained, **kwargs)


@register_model
def se_resnet62_cifar(pretrained: bool = False, **kwargs: Any) -> SeResNet:
    """Ten blocks a stage, 15,257,946 parameters at 10 classes."""
    return _create(62, pretrained, **kwargs)
