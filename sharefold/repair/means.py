"""Undoes a constant change of a layer's output, in its bias or in the running mean of its BatchNorm."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.problem import target_weight
from sharefold.graph import NetworkGraph
from sharefold.layers import SharedConv, checked_form, shared_layers


@torch.no_grad()
def absorb_means(original: nn.Module, model: nn.Module, graph: NetworkGraph, means: dict[str, Tensor]) -> None:
    """Keeps every converted layer's mean output what it was on the calibration images.

    Args:
        means: per layer the mean input patch (G, N) that the original network gave it.
    """
    for name, layer in shared_layers(model).items():
        record = graph.layers.get(name)
        if record is None or name not in means:
            continue
        owner = output_mean_owner(original, original.get_submodule(name), record.norm)
        dense = original.get_submodule(name)
        if owner is None or (owner is dense and layer.own_bias is None):  # the bias may be the bank's
            continue
        form = checked_form(name, dense)
        change = target_weight(dense, form) - form.standardized(layer.compose(), None).reshape(form.out_channels, -1)
        mean = means[name].to(change)
        shift = torch.einsum("gon,gn->go", change.reshape(len(mean), -1, mean.shape[1]), mean).reshape(-1)
        _shift(model, layer, record.norm, shift)


def _shift(model: nn.Module, layer: SharedConv, norm: str | None, shift: Tensor) -> None:
    """Adds the constant ``shift`` (O,) to the layer's output."""
    if layer.gain is not None:
        assert layer.form.standardize is not None
        shift = shift * layer.gain.reshape(-1) * layer.form.standardize[1]
    if layer.own_bias is not None:
        layer.own_bias.add_(shift)
        return
    assert norm is not None
    mean = cast(Tensor, model.get_submodule(norm).running_mean)
    mean -= shift
