"""LruNet: four stages, each one block run N times (``lrunet``), and its unshared twin (``lrunet_unrolled``).

Paper: Köpüklü et al., "Convolutional Neural Networks with Layer Reuse", https://arxiv.org/abs/1901.09615.
``lrunet`` uses the parameter names of the public weights of https://github.com/okankop/CNN-layer-reuse (MIT), which
load unchanged. What differs from that repository: global pooling instead of a fixed 2 x 2 window (equal at 32 x 32),
dropout is an argument that defaults to 0, and timm's interface.

One iteration (no biases, no activation between the two convolutions)::

    y = BN_dw[i](dw(x));  y = BN_pw[i](pw(y));  y = ReLU(y + x);  shuffle(y) unless it is the last iteration

In ``lrunet_unrolled`` all N blocks of a stage end with the shuffle, so that they are equal in structure, and the
stage undoes the last one. Permutations are exact, so both forms give the same numbers bit for bit.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.models._base import cifar_cfg, init_he, unwrap_checkpoint

__all__ = ["LruNet", "LruNetUnrolled", "repeat_lrunet", "unroll_lrunet"]

STEM = 64
STAGES = (1, 2, 3, 4)


class Shuffle(nn.Module):
    """Swap the channel halves, then interleave them: (a, b) -> b0 a0 b1 a1 ... Shape (N, C, H, W), C even."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=1)
        return torch.stack((second, first), dim=2).flatten(1, 2)


class Unshuffle(nn.Module):
    """Inverse of :class:`Shuffle`. Shape (N, C, H, W), C even."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[:, 1::2], x[:, 0::2]), dim=1)


def _depthwise(chans: int) -> nn.Conv2d:
    return nn.Conv2d(chans, 2 * chans, 3, padding=1, groups=chans, bias=False)


def _pointwise(chans: int) -> nn.Conv2d:
    return nn.Conv2d(2 * chans, chans, 1, groups=8, bias=False)


class ReusedStage(nn.Module):
    """One block run ``reuse`` times on (N, chans, H, W): shared convolutions, two BatchNorms per iteration."""

    def __init__(self, chans: int, reuse: int) -> None:
        super().__init__()
        self.reuse = reuse
        self.dw = _depthwise(chans)
        self.pw = _pointwise(chans)
        self.dw_bn_list = nn.ModuleList(nn.BatchNorm2d(2 * chans) for _ in range(reuse))
        self.pw_bn_list = nn.ModuleList(nn.BatchNorm2d(chans) for _ in range(reuse))
        self.act = nn.ReLU()
        self.shuffle = Shuffle()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.reuse):
            y = self.dw_bn_list[i](self.dw(x))
            y = self.pw_bn_list[i](self.pw(y))
            x = self.act(y + x)
            if i < self.reuse - 1:
                x = self.shuffle(x)
        return x


class LruBlock(nn.Module):
    """One iteration with its own convolutions, shuffle included. Shape (N, chans, H, W) in and out."""

    def __init__(self, chans: int) -> None:
        super().__init__()
        self.dw = _depthwise(chans)
        self.dw_bn = nn.BatchNorm2d(2 * chans)
        self.pw = _pointwise(chans)
        self.pw_bn = nn.BatchNorm2d(chans)
        self.act = nn.ReLU()
        self.shuffle = Shuffle()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.pw_bn(self.pw(self.dw_bn(self.dw(x))))
        return self.shuffle(self.act(y + x))


def unrolled_stage(chans: int, reuse: int) -> nn.Sequential:
    """``blocks`` (a Sequential of ``reuse`` equal blocks), then ``restore``, which undoes the last shuffle."""
    blocks = nn.Sequential(*(LruBlock(chans) for _ in range(reuse)))
    return nn.Sequential(OrderedDict(blocks=blocks, restore=Unshuffle()))


class _LruBase(nn.Module):
    """Stem, four stages, head. Channels double by concatenating the map with itself; max pooling halves the size."""

    stage1: nn.Module
    stage2: nn.Module
    stage3: nn.Module
    stage4: nn.Module

    def __init__(
        self,
        reuse: int = 14,
        width: int = 1,
        num_classes: int = 10,
        in_chans: int = 3,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if reuse < 1:
            raise SharefoldError(f"reuse={reuse}: LruNet runs every block at least once: give 1 or more")
        if width not in (1, 2):
            raise SharefoldError(f"width={width}: the stem of LruNet is fixed at {STEM} channels: give 1 or 2")
        self.reuse, self.width, self.num_classes = reuse, width, num_classes
        self.in_chans, self.drop = in_chans, drop
        self.num_features = 8 * STEM * width
        self.head_hidden_size = 4 * STEM * width
        self.features = nn.Sequential(
            nn.Conv2d(in_chans, STEM, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()
        )
        for stage in STAGES:
            setattr(self, f"stage{stage}", self.make_stage(STEM * width * 2 ** (stage - 1), reuse))
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.classifier = nn.Sequential(
            nn.Conv2d(self.num_features, self.head_hidden_size, 1, groups=8, bias=False),
            nn.BatchNorm2d(self.head_hidden_size),
            nn.ReLU(),
            nn.Dropout(drop),
            self.make_classifier(num_classes),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
        )
        init_he(self)

    @staticmethod
    def make_stage(chans: int, reuse: int) -> nn.Module:
        raise NotImplementedError

    def make_classifier(self, num_classes: int) -> nn.Module:
        return nn.Conv2d(self.head_hidden_size, num_classes, 1) if num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier[4]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one (0 classes: identity). The pooling is part of the architecture."""
        if global_pool not in (None, "avg"):
            raise SharefoldError(f"global_pool={global_pool}: LruNet averages its logits over the map: leave it out")
        old = next(self.parameters())
        self.num_classes = num_classes
        self.classifier[4] = self.make_classifier(num_classes).to(device=old.device, dtype=old.dtype)
        self.train(self.training)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^features", "blocks": r"^stage(\d+)"}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) -> (N, 512 * width, H / 16, W / 16)."""
        x = self.features(x)
        if self.width == 2:
            x = torch.cat((x, x), dim=1)
        x = self.pool(self.stage1(x))
        x = self.pool(self.stage2(torch.cat((x, x), dim=1)))
        x = self.stage3(torch.cat((x, x), dim=1))
        return self.pool(self.stage4(torch.cat((x, x), dim=1)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(N, 512 * width, h, w) -> (N, num_classes) logits, which are non-negative: the network ends in a ReLU."""
        if pre_logits:
            return self.classifier[3](self.classifier[2](self.classifier[1](self.classifier[0](x)))).mean((2, 3))
        return self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that rebuild this architecture."""
        return {
            "reuse": self.reuse,
            "width": self.width,
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "drop": self.drop,
        }


class LruNet(_LruBase):
    """Layer-reuse network. Input (N, in_chans, H, W) in [0, 1], not normalised; output (N, num_classes)."""

    make_stage = staticmethod(ReusedStage)


class LruNetUnrolled(_LruBase):
    """:class:`LruNet` with separate convolutions in every iteration: the dense network that layer reuse starts from."""

    make_stage = staticmethod(unrolled_stage)


def unroll_lrunet(model: LruNet) -> LruNetUnrolled:
    """The unshared twin with the same weights, hence the same logits bit for bit; ``model`` is not changed."""
    twin = LruNetUnrolled(**model.arguments())
    _copy_frame(model, twin)
    for stage in STAGES:
        shared = getattr(model, f"stage{stage}")
        for i, block in enumerate(getattr(twin, f"stage{stage}").blocks):
            block.dw, block.pw = copy.deepcopy(shared.dw), copy.deepcopy(shared.pw)
            block.dw_bn, block.pw_bn = copy.deepcopy(shared.dw_bn_list[i]), copy.deepcopy(shared.pw_bn_list[i])
    return twin.train(model.training)


def repeat_lrunet(model: LruNetUnrolled) -> LruNet:
    """Inverse of :func:`unroll_lrunet`; ``model`` is not changed.

    Raises:
        SharefoldError: the blocks of a stage have different convolutions, so that no :class:`LruNet` computes the same.
    """
    shared = LruNet(**model.arguments())
    _copy_frame(model, shared)
    for number in STAGES:
        stage, blocks = getattr(shared, f"stage{number}"), getattr(model, f"stage{number}").blocks
        for i, block in enumerate(blocks):
            for name in ("dw", "pw"):
                if not torch.equal(getattr(block, name).weight, getattr(blocks[0], name).weight):
                    raise SharefoldError(
                        f"unequal weights: stage{number}.blocks.{i}.{name}: only equal blocks become one that computes the same, "
                        "use the layer-reuse recipe to fit a shared one"
                    )
            stage.dw_bn_list[i], stage.pw_bn_list[i] = copy.deepcopy(block.dw_bn), copy.deepcopy(block.pw_bn)
        stage.dw, stage.pw = copy.deepcopy(blocks[0].dw), copy.deepcopy(blocks[0].pw)
    return shared.train(model.training)


def _copy_frame(source: _LruBase, target: _LruBase) -> None:
    target.features, target.classifier = copy.deepcopy(source.features), copy.deepcopy(source.classifier)
    for name in ("pretrained_cfg", "default_cfg"):
        if hasattr(source, name):
            setattr(target, name, copy.deepcopy(getattr(source, name)))


def _cfg(url: str = "") -> dict[str, Any]:
    return cifar_cfg(
        url,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        pool_size=(2, 2),
        first_conv="features.0",
        classifier="classifier.4",
        license="mit",
    )


default_cfgs = generate_default_cfgs(
    {
        # weights for the default arguments only (14 iterations, width 1)
        "lrunet.cifar10": _cfg(
            "https://github.com/okankop/CNN-layer-reuse/raw/master/pretrained/cifar10-lru14-ckpt-08934.t7"
        ),
        "lrunet_unrolled": _cfg(),
    }
)


@register_model
def lrunet(pretrained: bool = False, **kwargs: Any) -> LruNet:
    """LruNet; ``reuse`` iterations per stage (14), ``width`` 1 or 2, ``num_classes``, ``in_chans``, ``drop``."""
    return build_model_with_cfg(LruNet, "lrunet", pretrained, pretrained_filter_fn=unwrap_checkpoint, **kwargs)


@register_model
def lrunet_unrolled(pretrained: bool = False, **kwargs: Any) -> LruNetUnrolled:
    """LruNet without reuse: ``reuse`` separate blocks per stage; other arguments as in :func:`lrunet`."""
    return build_model_with_cfg(LruNetUnrolled, "lrunet_unrolled", pretrained, **kwargs)
