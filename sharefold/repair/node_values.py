"""Values of single nodes of a traced network, run by the modules that a network has now."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from sharefold.inputs import Input, each_of
from sharefold.layers import resolve
from sharefold.repair.boundary import Values


def fetch(argument: Any, values: Values) -> Any:
    """An argument of a node, with values for the nodes in it."""
    return fx.node.map_arg(argument, lambda n: values[n])


def value_at(node: fx.Node, model: nn.Module, values: Values) -> Tensor | None:
    """What the node has given, or gives now that its inputs are there: a shortcut often comes after the layers it skips."""
    steps = _ahead(node, model, values)
    if steps is None or not _harmless(steps, model, values):
        return None
    found = _computed(steps, model, dict(values))[node]
    return found if isinstance(found, Tensor) else None


def _ahead(node: fx.Node, model: nn.Module, values: Values) -> list[fx.Node] | None:
    """What must run to give ``node``'s value, in order; None if something of it must wait for its turn."""
    steps: dict[fx.Node, None] = {}

    def possible(node: fx.Node) -> bool:
        if node in values or node in steps:
            return True
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        if node.op == "call_module" and any(True for _ in resolve(model, str(node.target)).parameters()):
            return False  # may be a layer that is not repaired yet
        if not all(possible(used) for used in node.all_input_nodes):
            return False
        steps[node] = None
        return True

    return list(steps) if possible(node) else None


def _harmless(steps: list[fx.Node], model: nn.Module, values: Values) -> bool:
    """Whether the steps leave their inputs as they are: in place, they would do their work twice."""
    tensors: list[Tensor] = []

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf.clone())
        return tensors[-1]

    used = {node for step in steps for node in step.all_input_nodes if node in values}
    copies = {node: fx.node.map_aggregate(values[node], copied) for node in used}
    versions = [tensor._version for tensor in tensors]
    _computed(steps, model, copies)
    return versions == [tensor._version for tensor in tensors]


def _computed(steps: list[fx.Node], model: nn.Module, values: Values) -> dict[fx.Node, Any]:
    """``values``, and those of the steps."""
    for step in steps:
        values[step] = run_node(step, model, values, None)
    return values


def run_node(node: fx.Node, model: nn.Module, values: Values, batch: Input | None) -> Any:
    """What the node gives, of ``values`` and of ``batch``, which the network is given; None where that was read already."""
    if node.op == "placeholder":
        # A traced forward may have optional arguments behind those that the batch has tensors for.
        place = [other for other in node.graph.nodes if other.op == "placeholder"].index(node)
        given = () if batch is None else each_of(batch)
        return given[place].clone() if place < len(given) else (node.args[0] if node.args else None)
    args, kwargs = fetch(node.args, values), fetch(node.kwargs, values)
    if node.op == "get_attr":
        return resolve(model, str(node.target))
    if node.op == "call_module":
        return resolve(model, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
