"""The order of a walk through a network whose inputs pass the same layers, as those of a siamese network do.

A graph has all of one branch before all of the other. A layer that is solved when the first branch gets there would be solved for
that branch alone. So the calls of a layer are brought side by side, wherever none of them needs what another one gives.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from torch import fx, nn

from sharefold.graph.trace import same_output
from sharefold.inputs import Input
from sharefold.layers import resolve
from sharefold.repair.boundary import Values
from sharefold.repair.node_values import run_node


def calls_together(network: nn.Module, nodes: list[fx.Node], one: Input) -> list[fx.Node]:
    """``nodes`` of the graph of ``network`` with the calls of every layer :func:`side_by_side`, if it says the same of ``one``
    sample in that order."""
    order = side_by_side(nodes, lambda name: any(True for _ in resolve(network, name).parameters()))
    if order != nodes and not same_output(*(_ends(network, some, one) for some in (nodes, order))):
        return nodes
    return order


def _ends(network: nn.Module, nodes: list[fx.Node], one: Input) -> list[object]:
    """The values that the network returns."""
    values: Values = {}
    for node in nodes:
        values[node] = run_node(node, network, values, one)
    output = next(reversed(nodes[0].graph.nodes))
    return [values[node] for node in output.all_input_nodes]


def side_by_side(nodes: Sequence[fx.Node], wanted: Callable[[str], bool]) -> list[fx.Node]:
    """``nodes`` of a graph, without its output, with the calls of one module next to each other as far as can be.

    What writes into its input may have to stay where it is, which a graph does not say: run the new order and see.

    Args:
        wanted: whether the module of this name matters.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if node.op == "call_module" and wanted(str(node.target)):
            calls.setdefault(str(node.target), []).append(node)
    first = {node: node for node in nodes}
    order = list(nodes)
    for group in calls.values():
        together = {**first, **dict.fromkeys(group, group[0])}
        found = _sorted(nodes, together) if len(group) > 1 else None
        if found is not None:
            first, order = together, found
    return order


def _sorted(nodes: Sequence[fx.Node], first: dict[fx.Node, fx.Node]) -> list[fx.Node] | None:
    """An order in which every node comes after what it uses, and after the ``first`` of its group at once; the earliest in
    ``nodes`` first; None where there is none."""
    place = {node: index for index, node in enumerate(nodes)}
    members: dict[fx.Node, list[fx.Node]] = {}
    needs: dict[fx.Node, set[fx.Node]] = {}
    users: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        members.setdefault(first[node], []).append(node)
        ahead = needs.setdefault(first[node], set())
        for used in node.all_input_nodes:
            ahead.add(first[used])
            users.setdefault(first[used], set()).add(first[node])
    ready = [place[node] for node, ahead in needs.items() if not ahead]
    heapq.heapify(ready)
    order: list[fx.Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order += members[node]
        for user in users.get(node, ()):
            needs[user].discard(node)
            if not needs[user]:
                heapq.heappush(ready, place[user])
    return order if len(order) == len(nodes) else None
