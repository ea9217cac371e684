"""Keeps or sets the mean of a layer's output, through its bias or the running mean of its BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.graph import NetworkGraph
from sharefold.layers import mean_output, shared_layers, shift_output, weight_matrix


@torch.no_grad()
def absorb_means(
    original: nn.Module, model: nn.Module, graph: NetworkGraph, means: dict[str, Tensor],
    protects: Callable[[str], bool] = lambda name: False,
) -> None:  # fmt: skip
    """Keeps every converted layer's mean output what it was on the calibration images.

    Args:
        means: per layer the mean input patch (G, N) that the original network gave it.
        protects: which modules have to stay as they are.
    """
    for name, layer in shared_layers(model).items():
        record = graph.layers.get(name)
        if record is None or name not in means:
            continue
        norm = None if record.norm is None or protects(record.norm) else record.norm
        owner = output_mean_owner(original, original.get_submodule(name), norm)
        dense = original.get_submodule(name)
        if owner is None or (owner is dense and layer.own_bias is None):  # the bias may be the bank's
            continue
        change = weight_matrix(dense) - weight_matrix(layer)
        shift = mean_output(change, means[name].to(change))
        shift_output(layer if layer.own_bias is not None else model.get_submodule(cast(str, record.norm)), shift)


@torch.no_grad()
def give_mean(original: nn.Module, model: nn.Module, layer: nn.Module, norm: str | None, constant: Tensor) -> None:
    """Makes ``constant`` (O,) what is added to the layer's product with its inputs, where a bias or a norm behind it can.

    Computed in the type and on the device of ``constant``.
    """
    owner = output_mean_owner(model, layer, norm)
    inner = cast("Tensor | None", layer.bias)  # what a norm inside of the layer adds, and the layer's own bias
    if inner is not None:
        constant = constant - inner.detach().to(constant)
    if owner is layer:
        shift_output(layer, constant)
    elif owner is not None and norm is not None:
        theirs, ours = (cast(Tensor, net.get_submodule(norm).running_mean) for net in (original, model))
        ours.copy_((theirs.to(constant) - constant).to(ours))
