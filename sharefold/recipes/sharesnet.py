"""ShaResNet: one stride-1 3x3 convolution a stage (https://arxiv.org/abs/1702.08782).

Which 3x3 takes part depends on the block: the second convolution, in basic blocks and in bottlenecks alike. In
networks with the norm behind the convolution every block of a stage takes part whose convolution has stride 1; in
pre-activation networks (ResNet-164 and the wide ResNets for CIFAR) the first block of a stage keeps its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sharefold.graph import NetworkGraph, find_groups
from sharefold.plans import GroupPlan
from sharefold.recipes.builders import Recipe, choice, nothing_fits, plain, square, tied_plan

NAME = "sharesnet"
ROLE = "conv2"


def build(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    first = choice(NAME, "first_block", options["first_block"], ("auto", "stride", "skip"))
    if first == "auto":
        first = "skip" if is_preactivation(graph) else "stride"
    groups = []
    for group in find_groups(graph, by_role=True, first_block=first, roles={ROLE}, kernel=3):
        members = tuple(
            name for name in group.members if square(graph.layers[name]) and plain(model, graph.layers[name])
        )
        if len(members) > 1:
            groups.append(replace(group, members=members))
    if not groups:
        raise nothing_fits(
            NAME,
            "it needs residual stages with two or more blocks whose second convolution is a 3x3 of "
            "stride 1 and equal width",
        )
    return [tied_plan(model, graph, group) for group in groups]


def is_preactivation(graph: NetworkGraph) -> bool:
    """Whether the layers that write the residual streams have no norm behind them, but layers inside do."""
    inside = [record for record in graph.layers.values() if record.block and record.role != "downsample"]
    last = {record.block: record for record in inside if not record.pooled}
    return bool(last) and all(r.norm is None for r in last.values()) and any(r.norm for r in inside)


SHARESNET = Recipe(
    NAME,
    "https://arxiv.org/abs/1702.08782",
    {"first_block": ("auto", "auto, stride (a first block of stride 1 shares too) or skip (it never does)")},
    build,
)
