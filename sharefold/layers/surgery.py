"""Replacing submodules by name, and turning shared layers back into stock ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from sharefold.layers.bank import ATTRIBUTE, Bank
from sharefold.layers.foreign import CARRIED, carry
from sharefold.layers.shared_conv import SharedConv

# What torch itself keeps on every module.
TORCHS = frozenset(vars(nn.Module()))
# What most attributes are.
PLAIN = frozenset((int, float, bool, str, type(None)))
# Lists of lists of modules are looked into this deep; longer ones hold something else.
DEPTH, LONGEST = 3, 10_000


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """:func:`replace_modules` of one."""
    replace_modules(model, {name: module})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts every one of ``modules`` in the place of the submodule of its name, and wherever else the network holds that: under
    other names, and in plain attributes, lists, tuples and dictionaries of its modules."""
    new: dict[int, nn.Module] = {}
    for name, module in modules.items():
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name) if parent_name else model
        module.train(parent.training)
        new[id(parent.get_submodule(leaf))] = module
    # As `model.modules()` goes, but without a generator a level: networks are walked once for every group that is replaced.
    waiting, seen = [model], {model}
    while waiting:
        owner = waiting.pop()
        held = owner.__dict__
        for key in held.keys() - TORCHS:
            value = held[key]
            if type(value) not in PLAIN and (other := _replaced(value, new, DEPTH)) is not value:
                held[key] = other
        for key, child in list(owner._modules.items()):
            if id(child) in new:
                setattr(owner, key, new[id(child)])
            elif child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)


def _replaced(value: Any, new: Mapping[int, nn.Module], depth: int) -> Any:
    """``value`` itself, or a container like it with ``new`` in the places of modules, which are given by their ids."""
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if not depth or not isinstance(value, list | tuple | dict) or not 0 < len(value) <= LONGEST:
        return value
    parts = [*value.values()] if isinstance(value, dict) else value
    if all(type(part) in PLAIN for part in parts):
        return value
    found = [_replaced(part, new, depth - 1) for part in parts]
    if all(a is b for a, b in zip(found, parts, strict=True)):
        return value
    if isinstance(value, dict):
        result = copy.copy(value)
        result.update(zip(value, found, strict=True))
        return result
    return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)


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
    stock: dict[str, nn.Module] = {}
    for name, layer in shared_layers(dense).items():
        stock[name] = layer.dense()
        if hasattr(layer, CARRIED):
            carry(layer, stock[name])
    replace_modules(dense, stock)
    if hasattr(dense, ATTRIBUTE):
        delattr(dense, ATTRIBUTE)
    return dense
