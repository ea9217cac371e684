"""What a BatchNorm amounts to in eval mode, and constant factors and shifts moved into it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 1e-6


def mean_output(weight: Tensor, mean: Tensor) -> Tensor:
    """(O,) what a layer with the weight (O, N) makes of its mean input patch (G, N), G conv groups, without a bias."""
    return torch.einsum("gon,gn->go", weight.reshape(len(mean), -1, mean.shape[1]), mean).reshape(-1)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) that a BatchNorm with running statistics amounts to in eval mode."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    return scale, -norm.running_mean * scale if norm.bias is None else norm.bias - norm.running_mean * scale


@torch.no_grad()
def set_affine(norm: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Makes a BatchNorm with scale and offset amount to ``scale`` and ``shift`` (C,) in eval mode: its statistics become 0 and
    1 - eps, which a file holds in one number each."""
    statistics, weight, bias = cast(Any, norm), cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    scale, shift = scale.to(weight), shift.to(bias)
    statistics.running_mean.zero_()
    statistics.running_var.fill_(1 - statistics.eps)
    weight.copy_(scale)
    bias.copy_(shift)


@torch.no_grad()
def make_identity(norm: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Gives a BatchNorm the statistics ``mean`` and ``variance`` (C,) and the scale and offset that undo them.

    In train mode it is nearly the identity, too, as long as the statistics are those of the data.
    """
    statistics, weight, bias = cast(Any, norm), cast(Tensor, norm.weight), cast(Tensor, norm.bias)
    statistics.running_mean.copy_(mean)
    statistics.running_var.copy_(variance)
    weight.copy_((variance + statistics.eps).sqrt())
    bias.copy_(mean)


@torch.no_grad()
def shift_output(owner: nn.Module, shift: Tensor) -> None:
    """Adds the constant ``shift`` (C,) to a layer's output: to the bias of ``owner``, or in front of a BatchNorm ``owner``."""
    mean = getattr(owner, "running_mean", None)
    if mean is not None:
        mean.sub_(shift.to(mean))
        return
    bias = owner.own_bias if hasattr(owner, "own_bias") else owner.bias  # a shared layer's, which a norm in it may add to
    cast(Tensor, bias).add_(shift.to(cast(Tensor, bias)))


def takes_scale(norm: nn.Module) -> bool:
    """Whether :func:`absorb_scale` can put an input scale into ``norm``."""
    return getattr(norm, "running_var", None) is not None and getattr(norm, "weight", None) is not None


@torch.no_grad()
def absorb_scale(norm: nn.Module, scale: Tensor) -> Tensor:
    """Changes a BatchNorm so that on inputs x it does in eval mode what it did on scale * x, scale (C,).

    As much as can be goes into the running statistics, so that it holds in train mode, too. Scales are kept away from
    0 so that the statistics stay finite.

    Returns:
        The scale (C,) that it took.
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
    return scale
