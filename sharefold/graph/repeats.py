"""Runs of consecutive blocks that could be one block run several times (LruNet, https://arxiv.org/abs/1901.09615)."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping

from torch import nn

from sharefold.graph.execution import ModuleRun
from sharefold.graph.records import Repeat

_VALUES = (int, float, bool, str, types.NoneType)


def structure(module: nn.Module) -> Hashable:
    """What must agree for two modules to differ in their tensors alone: class tree, plain settings, tensor shapes.

    Settings of dropout and stochastic depth are left out: they do nothing in eval mode and usually grow with depth.
    """
    return tuple(
        (
            name,
            type(child).__qualname__,
            () if "drop" in type(child).__name__.lower() else _settings(child),
            tuple((key, tuple(p.shape)) for key, p in child._parameters.items() if p is not None),
            tuple((key, tuple(b.shape)) for key, b in child._buffers.items() if b is not None),
        )
        for name, child in module.named_modules()
    )


def _settings(module: nn.Module) -> Hashable:
    found: list[tuple[str, Hashable]] = []
    for key, value in module.__dict__.items():
        if key.startswith("_") or key == "training" or "drop" in key:
            continue
        if isinstance(value, types.FunctionType):
            found.append((key, value.__qualname__))
        elif isinstance(value, _VALUES) or (isinstance(value, tuple) and all(isinstance(v, _VALUES) for v in value)):
            found.append((key, value))
    return tuple(found)


def find_repeats(model: nn.Module, runs: Mapping[str, ModuleRun]) -> list[Repeat]:
    """Runs of two or more children of one Sequential or ModuleList, outermost first, in module order.

    They are equal in structure, hold at least one layer, run once each, one right after the other, and give back a
    single tensor of the shape they take.
    """
    repeats: list[Repeat] = []
    taken: set[str] = set()
    for parent, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList) or _inside(parent, taken):
            continue
        for group in _equal_runs(parent, container, runs):
            taken.update(group)
            first, last = (name.rpartition(".")[2] for name in (group[0], group[-1]))
            repeats.append(Repeat(f"{parent}.{first}-{last}" if parent else f"{first}-{last}", tuple(group)))
    return repeats


def _inside(name: str, taken: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in taken for n in range(1, len(parts) + 1))


def _equal_runs(parent: str, container: nn.Module, runs: Mapping[str, ModuleRun]) -> Iterator[list[str]]:
    group: list[str] = []
    shape: Hashable = None
    for key, child in container.named_children():
        name = f"{parent}.{key}" if parent else key
        run = runs.get(name)
        if run is None or run.calls != 1 or run.end <= run.start or run.input_shape != run.output_shape:
            if len(group) > 1:
                yield group
            group = []
            continue
        own = structure(child)
        if group and own == shape and runs[group[-1]].end == run.start:
            group.append(name)
            continue
        if len(group) > 1:
            yield group
        group, shape = [name], own
    if len(group) > 1:
        yield group
