"""Where a constant change of a layer's output can be undone: its bias, or the running mean of its BatchNorm."""

from __future__ import annotations

from torch import nn

from sharefold.layers import SharedConv


def output_mean_owner(model: nn.Module, layer: nn.Module, norm: str | None) -> nn.Module | None:
    """The layer itself when it has a bias of its own, else the norm behind it when it keeps a running mean, else None."""
    if (layer.own_bias if isinstance(layer, SharedConv) else getattr(layer, "bias", None)) is not None:
        return layer
    found = None if norm is None else model.get_submodule(norm)
    return found if getattr(found, "running_mean", None) is not None else None
