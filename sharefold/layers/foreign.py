"""What users put on a layer beside what its class has: attributes and submodules, which a forward of theirs may read."""

from __future__ import annotations

from functools import cache

import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn

CARRIED = "_carried"


def carry(old: nn.Module, new: nn.Module) -> None:
    """Puts on ``new``, which takes the place of the layer ``old``, what is foreign on that and not taken on ``new``."""
    foreign: tuple[str, ...] = getattr(old, CARRIED, ())
    if not foreign:
        foreign = tuple(key for key in (*old.__dict__, *old._modules) if key not in _stock_names())
    taken = [key for key in foreign if not hasattr(new, key)]
    for key in taken:
        if key in old._modules:
            new.add_module(key, old._modules[key])
        else:
            new.__dict__[key] = old.__dict__[key]
    if taken:
        new.__dict__[CARRIED] = tuple(taken)


@cache
def _stock_names() -> frozenset[str]:
    """What a layer has by its class alone."""
    with torch.device("meta"):
        layers = [nn.Conv2d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.Linear(1, 1)]
        layers += [kind(1, 1, 1) for kind in (Conv2dSame, StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)]
    return frozenset(key for layer in layers for key in layer.__dict__) | {CARRIED}
