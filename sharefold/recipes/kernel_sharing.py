"""Kernel sharing: every isomorphic convolution of a stage is one, biases too (https://arxiv.org/abs/2210.14151).

Isomorphic means the same kernel size, input and output channels; the place in the block and the stride do not matter.
Stems, shortcuts, gates and classifiers keep their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.graph import Group, NetworkGraph, find_groups
from sharefold.plans import GroupPlan
from sharefold.recipes.builders import Recipe, nothing_fits, plain, tied_plan

NAME = "kernel-sharing"
KEPT = {"stem", "head", "transition", "downsample", "se_reduce", "se_expand"}


def build(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    numbers = block_stages(graph)
    wanted = _stages(options["stages"], len(numbers))
    roles = {record.role for record in graph.layers.values()} - KEPT
    groups: list[Group] = []
    for group in find_groups(graph, roles=roles):
        members = tuple(name for name in group.members if plain(model, graph.layers[name]))
        if len(members) > 1 and numbers.get(group.stage, 0) in wanted:
            groups.append(replace(group, members=members))
    if not groups:
        raise nothing_fits(NAME, "it needs stages with two or more Conv2d of equal kernel size and channels")
    return [tied_plan(model, graph, group, share_bias=True) for group in groups]


def block_stages(graph: NetworkGraph) -> dict[int, int]:
    """Graph stage -> 1, 2, ... in the order of the stages that hold blocks (or, without blocks, any layer)."""
    blocks = [record.stage for record in graph.layers.values() if record.block]
    stages = blocks or [record.stage for record in graph.layers.values()]
    return {stage: number for number, stage in enumerate(dict.fromkeys(stages), start=1)}


def _stages(text: str, count: int) -> set[int]:
    if text == "all":
        return set(range(1, count + 1))
    parts = text.split("+")
    if not all(part.isdigit() and 1 <= int(part) <= count for part in parts):
        raise SharefoldError(
            f"recipe {NAME}: stages={text}: give all, or numbers from 1 to {count} joined by +, as in 2+3"
        )
    return {int(part) for part in parts}


KERNEL_SHARING = Recipe(
    NAME,
    "https://arxiv.org/abs/2210.14151",
    {"stages": ("all", "all, or stages counted from 1 and joined by +, as in 2+3")},
    build,
)
