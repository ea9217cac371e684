"""The weights of all layers that are alike, put together at once.

A network of many small layers spends its training step in small products: some thirty operations a layer to make its weight of
filters and coefficients and to send the gradients back. Layers of one bank have tensors of the same shapes, so that one batched
product serves all of them. The weights are those that each layer would make by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sharefold.layers.basis_conv import BasisConv
from sharefold.layers.hybrid_conv import HybridConv
from sharefold.layers.shared_conv import SharedConv
from sharefold.layers.spatial_conv import SpatialConv
from sharefold.layers.surgery import shared_layers
from sharefold.layers.weight_order import autocast_dtype

_KINDS = (BasisConv, HybridConv, SpatialConv)
_NOT_COMPOSED = ("own_bias", "gain")  # parameters that are no part of the weight


@contextmanager
def composed_together(model: nn.Module) -> Iterator[int]:
    """While active, layers of ``model`` that are alike use weights that were put together at once, as they are now.

    For one forward and backward pass: the weights carry gradients to the layers' tensors, and do not follow changes of those.
    Under autocast they are rounded once, to its type. Layers that are alone in their kind put theirs together as ever.

    Yields:
        How many layers were served.
    """
    served: list[SharedConv] = []
    try:
        for layers in _alike(model):
            for layer, weight in zip(layers, _weights(layers), strict=True):
                layer.given = weight
                served.append(layer)
        yield len(served)
    finally:
        for layer in served:
            layer.given = None


def _alike(model: nn.Module) -> list[list[SharedConv]]:
    """Layers with the same bank, form of weight and shapes of tensors; two at least."""
    found: dict[tuple[Any, ...], list[SharedConv]] = {}
    for layer in shared_layers(model).values():
        plain = layer.pivots is None and layer.form.standardize is None and getattr(layer, "norm", None) is None
        if type(layer) in _KINDS and plain and not layer.runs_factored():
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in _own(layer).items())
            found.setdefault((type(layer), id(layer.bank), layer.form.weight_shape, layer.form.kind, shapes), []).append(layer)
    return [layers for layers in found.values() if len(layers) > 1]


def _own(layer: SharedConv) -> dict[str, nn.Parameter]:
    return {name: tensor for name, tensor in layer.named_parameters(recurse=False) if name not in _NOT_COMPOSED}


class _Composer(nn.Module):
    """Calls ``compose`` where ``functional_call`` calls ``forward``."""

    def __init__(self, layer: SharedConv) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.compose()


def _weights(layers: list[SharedConv]) -> list[Tensor]:
    """The weights (O, I/groups, h, w) of layers that are alike, in the order in memory of the images' channels last."""
    every = [_own(layer) for layer in layers]
    stacked = {f"layer.{name}": torch.stack([own[name] for own in every]) for name in every[0]}
    composer, kind = _Composer(layers[0]), next(iter(every[0].values())).device.type
    wanted = autocast_dtype(kind)
    with nullcontext() if wanted is None else torch.autocast(kind, enabled=False):
        weights = torch.vmap(lambda tensors: functional_call(composer, tensors, ()))(stacked)
    if wanted is None or weights.dtype == torch.float64:  # which autocast leaves alone
        wanted = weights.dtype
    last = weights.movedim(2, -1).to(wanted, memory_format=torch.contiguous_format)
    return list(last.movedim(-1, 2).unbind(0))
