"""Layer reuse: N equal blocks in sequence become one, run N times (LruNet, https://arxiv.org/abs/1901.09615)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import fx, nn

from sharefold.graph import NetworkGraph, Repeat
from sharefold.methods.reuse import repeated_size
from sharefold.models.lrunet import LruNet
from sharefold.plans import GroupPlan
from sharefold.recipes.builders import Recipe, nothing_fits

NAME = "layer-reuse"


def build(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    longest = options["reuse"]
    plans = []
    for run in (part for repeat in graph.repeats for part in _in_sequence(graph, repeat)):
        for blocks in _cut(run, longest):
            before, after = repeated_size(model.get_submodule(blocks[0]), len(blocks))
            record = next((r for r in graph.layers.values() if r.name.startswith(f"{blocks[0]}.")), None)
            if record is None or after == before:
                continue
            name = f"stage{record.stage}.{blocks[0]}-{blocks[-1].rpartition('.')[2]}"
            plans.append(GroupPlan(name, "reuse", blocks, {}, before, after, None, record.stage, "block"))
    if not plans and not isinstance(model, LruNet):  # an LruNet repeats its blocks already
        raise nothing_fits(
            NAME, "it needs two or more blocks of one structure in sequence that keep the shape of their input"
        )
    return plans


def _in_sequence(graph: NetworkGraph, repeat: Repeat) -> list[tuple[str, ...]]:
    """The repeat cut where a block does not read the one before it: parallel branches are no iterations."""
    runs = [[repeat.blocks[0]]]
    for before, block in pairwise(repeat.blocks):
        if _feeds(graph, before, block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [tuple(run) for run in runs if len(run) > 1]


def _feeds(graph: NetworkGraph, before: str, block: str) -> bool:
    """Whether all that ``block`` reads comes out of ``before``; without a graph, nothing speaks against it."""
    if graph.fx_graph is None:
        return True
    sources = [
        operand
        for node in graph.fx_graph.nodes if _inside(node, block)
        for operand in node.all_input_nodes if operand.op != "get_attr" and not _inside(operand, block)
    ]  # fmt: skip
    return all(_inside(source, before) for source in sources)


def _inside(node: fx.Node, block: str) -> bool:
    places = [str(node.meta.get("owner", ""))] + ([str(node.target)] if node.op == "call_module" else [])
    return any(place == block or place.startswith(f"{block}.") for place in places)


def _cut(run: tuple[str, ...], longest: int) -> list[tuple[str, ...]]:
    size = longest or len(run)
    return [part for start in range(0, len(run), size) if len(part := run[start : start + size]) > 1]


LAYER_REUSE = Recipe(
    NAME,
    "https://arxiv.org/abs/1901.09615",
    {"reuse": (0, "most blocks to make one repeated block of; 0 takes every run of equal blocks as a whole")},
    build,
)
