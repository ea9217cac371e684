"""BatchNorms in two vectors instead of four and a counter."""

from __future__ import annotations

import torch
from torch import nn

from sharefold.layers import affine, set_affine


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
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
        set_affine(module, *affine(module))
