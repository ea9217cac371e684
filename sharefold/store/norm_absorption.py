"""BatchNorms in one vector instead of four and a counter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.graph import NetworkGraph
from sharefold.layers import SharedConv, affine, set_affine
from sharefold.layers.norm_fusion import fusable
from sharefold.plans import Plan
from sharefold.store.prepare import tensor_names


def absorbs(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm whose scale and offset can take up its statistics."""
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or not module.affine:
        return False
    return module.running_mean is not None and module.running_var is not None


@torch.no_grad()
def absorb_statistics(model: nn.Module, plan: Plan) -> None:
    """Puts the statistics of every BatchNorm that ``plan`` does not protect into its scale and offset; the network computes the
    same in eval mode.

    Mean and variance become 0 and 1 - eps, which the file holds in one number each. What the variance was is lost,
    and with it what the norm would do in train mode: run a few batches in train mode before tuning such a network.
    """
    for name, module in model.named_modules():
        if absorbs(module) and not plan.protects(name):
            set_affine(module, *affine(module))


@dataclass(frozen=True)
class Gain:
    """The scale (O,) float64 of the norm behind a layer, which the rows of that layer's tensor can take up."""

    layer: str
    norm: str
    scale: Tensor


def gains_of(model: nn.Module, graph: NetworkGraph, tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Gain]:
    """For those of ``tensors`` whose rows are the outputs of one layer, with a norm behind it that reads nothing else: its gain.

    Left out are layers with a bias, which others may read, norms that ``plan`` protects, and all of a network without a graph,
    where other readers of a layer's output are not seen.

    Args:
        tensors: those that are rounded, by name; of a network in eval mode.
    """
    if graph.fx_graph is None:
        return {}
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = Counter(id(modules[name]) for name in graph.layers if name in modules)
    norms = Counter(id(modules[record.norm]) for record in graph.layers.values() if record.norm in modules)
    found = {}
    for name, record in graph.layers.items():
        layer, norm = modules.get(name), None if record.norm is None else modules.get(record.norm)
        if record.norm is None or layer is None or norm is None or plan.protects(record.norm):
            continue
        if layers[id(layer)] > 1 or norms[id(norm)] > 1:
            continue
        if not absorbs(norm) or not fusable(layer, norm) or layer.bias is not None:
            continue
        if isinstance(layer, SharedConv) and layer.linear_part() is None:
            continue
        key, _ = tensor_names(name, layer)
        scale = affine(norm)[0].detach().double().cpu()
        if key in tensors and len(tensors[key]) == len(scale) and bool(scale.isfinite().all()):
            found[key] = Gain(name, record.norm, scale)
    return found


@torch.no_grad()
def take_up(model: nn.Module, gain: Gain) -> None:
    """Makes the norm's scale 1; the caller multiplies the rows of the layer's tensor by what it was."""
    cast(Tensor, model.get_submodule(gain.norm).weight).fill_(1)
