"""Roles that only the data flow can tell: shortcut convolutions and the layers of a squeeze-and-excitation gate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from sharefold.graph.execution import LayerRun, ModuleRun
from sharefold.graph.space_set import Chan
from sharefold.graph.spaces import Flow
from sharefold.layers import ConvForm


def roles_from_flow(
    flow: Flow, layers: Mapping[str, ConvForm], blocks: Mapping[str, str], whole: set[str]
) -> dict[str, str]:
    """The roles "downsample", "se_reduce" and "se_expand", for the layers that have them.

    Only blocks that return a single map (``whole``) have a shortcut.
    """
    roles: dict[str, str] = {}
    for node in flow.additions:
        owner = _block_around(node.meta["owner"], whole)
        if owner:
            inside = {name for name, block in blocks.items() if block == owner}
            roles.update(dict.fromkeys(_shortcut(node, owner, inside), "downsample"))
    for _, gate in flow.gates:
        chain = _gate_layers(gate, flow, layers)
        for name in chain:
            if blocks.get(name):
                roles[name] = "se_expand" if name == chain[-1] else "se_reduce"
    return roles


def _block_around(owner: str, holders: set[str]) -> str:
    while owner and owner not in holders:
        owner = owner.rpartition(".")[0]
    return owner


def _shortcut(node: fx.Node, block: str, layers: set[str]) -> set[str]:
    """Those of the block's own ``layers`` on the shorter of the two ways from its input into the sum ``node``."""
    ways = [_layers_before(operand, block, layers) for operand in node.all_input_nodes]
    if len(ways) != 2:
        return set()
    own = sorted((ways[0] - ways[1], ways[1] - ways[0]), key=len)
    return own[0] if len(own[0]) < len(own[1]) else set()


def _layers_before(start: fx.Node, block: str, layers: set[str]) -> set[str]:
    found: set[str] = set()
    stack, seen = [start], {start}
    while stack:
        node = stack.pop()
        owner = node.meta["owner"]
        if owner != block and not owner.startswith(f"{block}."):
            continue
        if node.op == "call_module" and str(node.target) in layers:
            found.add(str(node.target))
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return found


def _gate_layers(gate: fx.Node, flow: Flow, layers: Mapping[str, ConvForm]) -> list[str]:
    """Layers between a global pooling and the gate, in forward order; empty when the gate is not made from one."""
    found: list[str] = []
    stack, seen = [gate], {gate}
    while stack:
        node = stack.pop()
        value = flow.values.get(node)
        if not isinstance(value, Chan) or not value.pooled:
            continue
        if node.op == "call_module" and str(node.target) in layers:
            found.append(str(node.target))
        for operand in node.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return list(dict.fromkeys(reversed(found)))


def roles_from_run(
    runs: Mapping[str, LayerRun], modules: Mapping[str, ModuleRun], layers: Mapping[str, ConvForm],
    blocks: Mapping[str, str], pooled: set[str],
) -> dict[str, str]:  # fmt: skip
    """The same roles without a graph.

    A shortcut convolution takes the very tensor that enters its block, has a 1x1 kernel and gives the block's output
    shape, while a later or earlier layer of the block takes that tensor too. Layers on pooled vectors in a block that
    also has maps belong to a gate: the last one in each parent module expands.
    """
    roles: dict[str, str] = {}
    for block in dict.fromkeys(name for name in blocks.values() if name):
        members = [name for name in runs if blocks[name] == block]
        readers = [name for name in members if block in runs[name].reads_input_of and name not in pooled]
        for name in readers:
            run = runs[name]
            if len(readers) > 1 and layers[name].kernel_size == (1, 1) and run.output_shape == modules[block].output_shape:
                roles[name] = "downsample"
        gates = [name for name in members if name in pooled]
        if len(gates) == len(members):
            continue
        for name in gates:
            parent = name.rpartition(".")[0]
            siblings = [other for other in gates if other.rpartition(".")[0] == parent]
            roles[name] = "se_expand" if name == siblings[-1] else "se_reduce"
    return roles
