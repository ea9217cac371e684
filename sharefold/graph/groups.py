"""Groups of isomorphic layers: what can share filters inside a stage.

"Isomorphic" as in kernel sharing (https://arxiv.org/abs/2210.14151): the same kernel size, input and output channels.
(Torch-Pruning uses the word for sub-networks of equal topology, which is something else.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.graph.records import Group, LayerRecord, NetworkGraph
from sharefold.options import FIRST_BLOCK, GroupOptions, chosen


def find_groups(graph: NetworkGraph, options: GroupOptions | None = None, **settings: Any) -> list[Group]:
    """Groups of layers that agree in stage, kind, kernel size, channels and conv groups, in forward order.

    Layers on pooled vectors never join layers on maps. Padding and dilation do not matter: they are no part of the
    weight.

    Args:
        options: which layers count; ``settings`` are single fields of it (``by_role=True``).

    Raises:
        SharefoldError: unknown ``first_block``, or an expression that does not compile.
    """
    options = chosen(options, settings, GroupOptions)
    if options.first_block not in FIRST_BLOCK:
        raise SharefoldError(
            f"first_block={options.first_block!r}: unknown policy: choose one of {', '.join(FIRST_BLOCK)}"
        )
    wanted, unwanted = _patterns("include", options.include), _patterns("exclude", options.exclude)
    size = (options.kernel, options.kernel) if isinstance(options.kernel, int) else options.kernel
    found: dict[str, list[LayerRecord]] = {}
    for record in graph.layers.values():
        if options.first_block == "skip" and record.block_index == 0:
            continue
        if options.roles is not None and record.role not in options.roles:
            continue
        if size is not None and record.weight_shape[2:] != size:
            continue
        if wanted and not any(p.search(record.name) for p in wanted):
            continue
        if any(p.search(record.name) for p in unwanted):
            continue
        found.setdefault(_name(record, options.by_role, options.first_block == "stride"), []).append(record)
    return [_group(name, members) for name, members in found.items() if len(members) >= max(1, options.min_members)]


def _group(name: str, members: list[LayerRecord]) -> Group:
    first = members[0]
    role = "+".join(dict.fromkeys(record.role for record in members))
    return Group(name, first.stage, role, tuple(r.name for r in members), first.weight_shape, first.groups)


def _name(record: LayerRecord, by_role: bool, by_stride: bool) -> str:
    """The name spells out the whole key, so equal names mean one group."""
    h, w = record.weight_shape[2:]
    parts = [f"stage{record.stage}"]
    if by_role:
        parts.append(record.role)
    depthwise = record.groups > 1 and record.weight_shape[1] == record.depth
    size = f"{record.depth}x{h}x{w}" if record.kind.endswith("3d") else f"{h}x{w}"
    turned = "t" if record.kind.startswith("conv_transpose") else ""
    kind = "linear" if record.kind == "linear" else f"{'dw' if depthwise else 'conv'}{turned}{size}"
    if depthwise and record.in_channels == record.out_channels:
        kind += f"-{record.out_channels}"
    else:
        kind += f"-{record.in_channels}-{record.out_channels}"
        if record.groups > 1 and not depthwise:
            kind += f"-g{record.groups}"
    if by_stride and set(record.stride) != {1}:
        kind += "-s" + "x".join(str(s) for s in dict.fromkeys(record.stride))
    if record.pooled:
        kind += "-pooled"
    return ".".join([*parts, kind])


def _patterns(what: str, value: str | Iterable[str] | None) -> list[re.Pattern[str]]:
    texts = [] if value is None else [value] if isinstance(value, str) else list(value)
    try:
        return [re.compile(text) for text in texts]
    except re.error as error:
        raise SharefoldError(f"{what}: {error} in {error.pattern!r}: give a valid regular expression") from None
