"""Moves a constant factor of a layer's output into the BatchNorm behind the layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 1e-6


def takes_scale(norm: nn.Module) -> bool:
    """Whether :func:`fold_scale` can put an input scale into ``norm``."""
    return getattr(norm, "running_var", None) is not None and getattr(norm, "weight", None) is not None


@torch.no_grad()
def fold_scale(norm: nn.Module, scale: Tensor) -> None:
    """Changes a BatchNorm so that on inputs x it does in eval mode what it did on scale * x, scale (C,).

    As much as can be goes into the running statistics, so that it holds in train mode, too. Scales are kept away from
    0 so that the statistics stay finite.
    """
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    weight, eps = cast(Tensor, norm.weight), float(cast(Any, norm.eps))
    scale = scale.to(mean)
    scale = torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(SMALLEST_SCALE)
    old = variance + eps
    new = (old / scale.square()).clamp_min(eps)
    weight.mul_((scale * (new / old).sqrt()).to(weight))
    mean.div_(scale)
    variance.copy_(new - eps)
