"""BatchNorms in two vectors instead of four and a counter."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def absorb_statistics(model: nn.Module) -> None:
    """Puts every BatchNorm's statistics into its scale and offset; the network computes the same in eval mode.

    Mean and variance become 0 and 1 - eps, which the file holds in one number each. What the variance was is lost,
    and with it what the norm would do in train mode: run a few batches in train mode before tuning such a network.
    """
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or mean is None or variance is None:
            continue
        if not module.affine:
            continue
        weight, bias = module.weight, cast(Tensor, module.bias)
        scale = weight.double() / (variance.double() + module.eps).sqrt()
        bias.copy_((bias.double() - mean.double() * scale).to(bias))
        weight.copy_(scale.to(weight))
        mean.zero_()
        variance.fill_(1 - module.eps)
