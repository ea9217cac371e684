"""Takes channels out of modules, and puts places for them back: tensors and the attributes that tell their shape.

Modules stay the objects that they are, of whatever class; their parameters are new ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Attributes in which modules that act on each channel note how many there are.
_COUNTS = ("num_features", "num_channels", "num_groups", "num_parameters", "channels")


@torch.no_grad()
def take_rows(module: nn.Module, kept: Tensor, channels: int) -> None:
    """Leaves ``kept`` of the ``channels`` that ``module`` writes or passes on: filters, biases, gains, entries of norms.

    Args:
        kept: (k,) sorted indices.
    """
    for part, key, tensor in _rows(module, channels):
        _put(part, key, tensor.index_select(0, kept.to(tensor.device)))
    _note_rows(module, channels, len(kept))


@torch.no_grad()
def give_rows(module: nn.Module, kept: Tensor, channels: int) -> None:
    """Undoes :func:`take_rows`: ``channels`` again, those that are not ``kept`` zero (of variance one)."""
    for part, key, tensor in _rows(module, len(kept)):
        whole = tensor.new_zeros(channels, *tensor.shape[1:])
        if key == "running_var":
            whole.fill_(1)
        _put(part, key, whole.index_copy_(0, kept.to(tensor.device), tensor))
    _note_rows(module, len(kept), channels)


@torch.no_grad()
def set_columns(module: nn.Module, weight: Tensor) -> None:
    """Gives a convolution or Linear without groups this weight, (O, I', h, w) or (O, I'), of any number of inputs I'."""
    _put(module, "weight", weight.to(module.weight).contiguous())  # type: ignore[arg-type]
    for key in ("in_channels", "in_features"):
        if hasattr(module, key):
            setattr(module, key, weight.shape[1])


@torch.no_grad()
def take_columns(module: nn.Module, kept: Tensor) -> None:
    """Leaves the weights on the inputs ``kept`` as they are, and no others."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    set_columns(module, weight.detach().index_select(1, kept.to(weight.device)))


@torch.no_grad()
def give_columns(module: nn.Module, kept: Tensor, channels: int) -> None:
    """``channels`` inputs again; the weights of those that are not ``kept`` are zero."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    whole = weight.new_zeros(len(weight), channels, *weight.shape[2:])
    set_columns(module, whole.index_copy_(1, kept.to(weight.device), weight))


def _rows(module: nn.Module, channels: int) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for part in module.modules():
        for key, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None and tensor.dim() > 0 and tensor.shape[0] == channels and tensor.numel() > 1:
                yield part, key, tensor


def _put(module: nn.Module, key: str, tensor: Tensor) -> None:
    if key in module._buffers:
        module._buffers[key] = tensor
    else:
        old = module._parameters[key]
        module._parameters[key] = nn.Parameter(tensor, requires_grad=old is not None and old.requires_grad)


def _note_rows(module: nn.Module, before: int, after: int) -> None:
    if isinstance(module, nn.Linear):
        module.out_features = after
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == module.in_channels == before and module.weight.shape[1] == 1:
            module.groups = module.in_channels = after  # depthwise
        module.out_channels = after
    else:
        for part in module.modules():
            for key in _COUNTS:
                if getattr(part, key, None) == before and not isinstance(getattr(part, key), bool):
                    setattr(part, key, after)
