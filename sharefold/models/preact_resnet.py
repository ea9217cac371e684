"""Pre-activation ResNets for CIFAR: ``resnet164_cifar`` and the wide ``wrn_40_4_cifar``, ``wrn_28_10_cifar``.

Papers: He et al., "Identity Mappings in Deep Residual Networks", https://arxiv.org/abs/1603.05027 (ResNet-164);
Zagoruyko and Komodakis, "Wide Residual Networks", https://arxiv.org/abs/1605.07146 (WRN-d-k, basic blocks without
dropout). Both are the CIFAR networks of ShaResNet, https://arxiv.org/abs/1702.08782. What differs from the papers'
Torch7 code: timm's interface and PyTorch's parameter names; nothing in the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sharefold.models._base import CifarNet, cifar_cfg, init_he

__all__ = ["PreActResNet"]


class _PreActBlock(nn.Module):
    """Shortcut rule of both blocks: identity where the shapes allow, else a bare 1x1 on the activated input."""

    bn1: nn.BatchNorm2d
    act1: nn.ReLU
    shortcut: nn.Conv2d | None

    def branch(self, activated: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.act1(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(activated)
        return self.branch(activated) + skip


class PreActBottleneck(_PreActBlock):
    """BN-ReLU-1x1(stride), BN-ReLU-3x3, BN-ReLU-1x1; the inner width is a quarter of ``out_chans``."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        mid = out_chans // 4
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_chans, mid, 1, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(mid, mid, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(mid)
        self.act3 = nn.ReLU()
        self.conv3 = nn.Conv2d(mid, out_chans, 1, bias=False)
        changes = stride != 1 or in_chans != out_chans
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False) if changes else None

    def branch(self, activated: torch.Tensor) -> torch.Tensor:
        out = self.conv2(self.act2(self.bn2(self.conv1(activated))))
        return self.conv3(self.act3(self.bn3(out)))


class PreActBasic(_PreActBlock):
    """BN-ReLU-3x3(stride), BN-ReLU-3x3."""

    def __init__(self, in_chans: int, out_chans: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chans)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chans)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False)
        changes = stride != 1 or in_chans != out_chans
        self.shortcut = nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False) if changes else None

    def branch(self, activated: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act2(self.bn2(self.conv1(activated))))


class PreActResNet(CifarNet):
    """3x3 stem of 16 channels, three stages of ``blocks`` blocks with ``widths`` output channels, BN and ReLU.

    Input (N, in_chans, H, W), output (N, num_classes) logits; made for 32 x 32.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        block: type[PreActBottleneck] | type[PreActBasic],
        blocks: int,
        widths: tuple[int, int, int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.feature_info = []
        previous = 16
        for number, (width, stride) in enumerate(zip(widths, (1, 2, 2), strict=True), start=1):
            units = [block(previous if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"layer{number}", nn.Sequential(*units))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (number - 1), "module": f"layer{number}"})
            previous = width
        self.bn = nn.BatchNorm2d(previous)
        self.act = nn.ReLU()
        self.build_head(previous, num_classes, global_pool, drop_rate)
        init_he(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [(r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)", None), (r"^bn", (99999,))]
        return {"stem": r"^conv1", "blocks": blocks}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, widths[2], H / 4, W / 4)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.act(self.bn(x))


def _cfg() -> dict[str, Any]:
    # channel statistics of the wide-residual-networks training scripts, on the scale 0..1
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return cifar_cfg(mean=tuple(v / 255 for v in mean), std=tuple(v / 255 for v in std))


default_cfgs = generate_default_cfgs(
    {"resnet164_cifar": _cfg(), "wrn_40_4_cifar": _cfg(), "wrn_28_10_cifar": _cfg()},
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> PreActResNet:
    return build_model_with_cfg(PreActResNet, variant, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs)


@register_model
def resnet164_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """Pre-activation ResNet-164 (9n+2, n = 18), 1,703,258 parameters at 10 classes."""
    return _create("resnet164_cifar", pretrained, block=PreActBottleneck, blocks=18, widths=(64, 128, 256), **kwargs)


@register_model
def wrn_40_4_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-40-4 (6n+4, n = 6), 8,949,210 parameters at 10 classes."""
    return _create("wrn_40_4_cifar", pretrained, block=PreActBasic, blocks=6, widths=(64, 128, 256), **kwargs)


@register_model
def wrn_28_10_cifar(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """WRN-28-10 (6n+4, n = 4), 36,536,884 parameters at 100 classes."""
    return _create("wrn_28_10_cifar", pretrained, block=PreActBasic, blocks=4, widths=(160, 320, 640), **kwargs)
