"""Blocks: the units that a network repeats, found from the module tree and from where residual sums are taken.

1. A module whose forward adds two maps is a block if the network holds at least two modules of its class with layers
   in them; then all modules of that class are blocks, first ones without a shortcut included.
2. Siblings of one class (under any parent) that hold at least two layers each are blocks, and so are all such
   modules of that class. Plain containers (Sequential, ModuleList) count only themselves, and only when they are
   equal in structure and lie in a plain container.
3. A module found by rule 2 that holds another block is a stage, not a block. The exception: a residual wrapper around
   one layer (ConvMixer) gives way to the repeated module that holds it.
4. Where the children of a plain container are blocks, so are its other children with at least two layers, and those of
   the containers beside it (the depthwise-separable block that opens an EfficientNet is one of a kind).

A layer belongs to the innermost block around it. Only modules that are called themselves are blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Sequence

from torch import nn

from sharefold.graph.repeats import structure

_PLAIN = (nn.Sequential, nn.ModuleList)


def ancestors(name: str) -> list[str]:
    """Qualified names of the modules around ``name``, innermost first, without the root."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def find_blocks(
    model: nn.Module, layers: Sequence[str], adders: Iterable[str], ran: Container[str]
) -> tuple[dict[str, str], bool]:  # fmt: skip
    """Block of every layer ("" for none), and whether some blocks add their input (rule 1).

    Args:
        layers: names of the layers that run; adders: names of the modules whose forward adds two maps ("" is the root).
        ran: names of the modules that were called themselves. Others (lists and dictionaries of layers, modules with a method
            of another name than forward) have no output that blocks could be compared by.
    """
    inside: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        for outer in ancestors(layer):
            inside[outer].append(layer)
    modules = {name: model.get_submodule(name) for name in inside}
    called = {name: module for name, module in modules.items() if name in ran}
    residual = _residual_blocks(called, set(adders))
    siblings = _sibling_blocks(modules, inside) & called.keys()
    wrappers = {name for name in residual if len(inside[name]) == 1 and _parent(name) in siblings}
    found = residual - wrappers
    for name in sorted(siblings, key=lambda n: -n.count(".")):
        if not any(other.startswith(f"{name}.") for other in found):
            found.add(name)
    found |= _beside(found, modules, inside) & called.keys()
    blocks = {layer: next((outer for outer in ancestors(layer) if outer in found), "") for layer in layers}
    return blocks, bool(residual - wrappers)


def _residual_blocks(modules: dict[str, nn.Module], adders: set[str]) -> set[str]:
    by_class: dict[type, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if not isinstance(module, _PLAIN):
            by_class[type(module)].append(name)
    return {name for names in by_class.values() if len(names) > 1 and adders & set(names) for name in names}


def _sibling_blocks(modules: dict[str, nn.Module], inside: dict[str, list[str]]) -> set[str]:
    families: dict[tuple, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if len(inside[name]) < 2:
            continue
        key: tuple = (_parent(name), type(module))
        if type(module) in _PLAIN:
            if not isinstance(modules.get(_parent(name)), _PLAIN):
                continue
            key = (*key, structure(module))
        families[key].append(name)
    found = {name for names in families.values() if len(names) > 1 for name in names}
    classes = {type(modules[name]) for name in found} - set(_PLAIN)
    return found | {name for name, module in modules.items() if type(module) in classes and len(inside[name]) > 1}


def _beside(found: set[str], modules: dict[str, nn.Module], inside: dict[str, list[str]]) -> set[str]:
    homes = {_parent(name) for name in found if isinstance(modules.get(_parent(name)), _PLAIN)}
    beside = {_parent(home) for home in homes if isinstance(modules.get(_parent(home)), _PLAIN)}
    more = set()
    for name in modules.keys() - found:
        home = _parent(name)
        at_home = home in homes or (_parent(home) in beside and isinstance(modules.get(home), _PLAIN))
        around = any(other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in found)
        if at_home and len(inside[name]) > 1 and not around:
            more.add(name)
    return more


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
