"""ConvMixer-256/16 for CIFAR (kernel 9, patch 1): ``convmixer_256_16_cifar``.

Papers: Trockman and Kolter, "Patches Are All You Need?", https://arxiv.org/abs/2201.09792; this configuration is the
one that kernel sharing, https://arxiv.org/abs/2210.14151, was measured on. The class is timm's ``ConvMixer``; only
the configuration is new.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.convmixer import ConvMixer

from sharefold.models._base import cifar_cfg

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "convmixer_256_16_cifar": cifar_cfg(
            interpolation="bicubic", pool_size=(32, 32), first_conv="stem.0", classifier="head"
        )
    },
)


@register_model
def convmixer_256_16_cifar(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer of width 256 and depth 16 at full resolution, 1,409,034 parameters at 10 classes."""
    out_indices = kwargs.pop("out_indices", 3)
    return build_model_with_cfg(
        ConvMixer,
        "convmixer_256_16_cifar",
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{"dim": 256, "depth": 16, "kernel_size": 9, "patch_size": 1, **kwargs},
    )
