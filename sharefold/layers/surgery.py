"""Replacing submodules by name, and turning shared layers back into stock ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sharefold.layers.bank import ATTRIBUTE, Bank
from sharefold.layers.shared_conv import SharedConv


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` in the place of the submodule called ``name``, and under every other name that this one has."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name) if parent_name else model
    module.train(parent.training)
    old = parent.get_submodule(leaf)
    # As `model.modules()` goes, but without a generator a level: networks are walked once for every layer that is replaced.
    waiting, seen = [model], {model}
    while waiting:
        owner = waiting.pop()
        for key, child in list(owner._modules.items()):
            if child is old:
                setattr(owner, key, module)
            elif child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def shared_layers(model: nn.Module) -> dict[str, SharedConv]:
    """Every shared layer of ``model`` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SharedConv)}


def stray_pointers(model: nn.Module) -> list[str]:
    """Names of integer tensors, as of a damaged file, with entries that point to nothing, or of pivots to one thing twice."""
    found = []
    for name, module in model.named_modules():
        for key, count in (module.pointers() if isinstance(module, SharedConv | Bank) else {}).items():
            values = getattr(module, key).long().flatten()
            stray = values.numel() > 0 and (int(values.min()) < 0 or int(values.max()) >= count)
            if stray or (key == "pivots" and len(values.unique()) < len(values)):
                found.append(f"{name}.{key}" if name else key)
    return found


@contextmanager
def running(model: nn.Module, runtime: str) -> Iterator[None]:
    """While active, shared layers of ``model`` whose runtime is ``auto`` run as ``runtime`` says (see ``RUNTIMES``)."""
    layers = [layer for layer in shared_layers(model).values() if layer.runtime == "auto"]
    try:
        for layer in layers:
            layer.runtime = runtime
        yield
    finally:
        for layer in layers:
            layer.runtime = "auto"


def to_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every shared layer is a stock layer of its own again and no bank is left."""
    dense = copy.deepcopy(model)
    for name, layer in shared_layers(dense).items():
        replace_module(dense, name, layer.dense())
    if hasattr(dense, ATTRIBUTE):
        delattr(dense, ATTRIBUTE)
    return dense
