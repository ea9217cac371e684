"""Groups of isomorphic layers: what can share filters inside a stage.

"Isomorphic" as in kernel sharing (https://arxiv.org/abs/2210.14151): the same kernel size, input and output channels.
(Torch-Pruning uses the word for sub-networks of equal topology, which is something else.)
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from sharefold.errors import SharefoldError
from sharefold.graph.records import Group, LayerRecord, NetworkGraph

FIRST_BLOCK = ("shape", "stride", "skip")


def find_groups(
    graph: NetworkGraph,
    *,
    by_role: bool = False,
    first_block: str = "shape",
    min_members: int = 2,
    roles: Collection[str] | None = None,
    kernel: int | tuple[int, int] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> list[Group]:
    """Groups of layers that agree in stage, kind, kernel size, channels and conv groups, in forward order.

    Layers on pooled vectors never join layers on maps. Padding and dilation do not matter: they are no part of the
    weight.

    Args:
        by_role: also tell roles apart (conv1 from conv2, expand from project).
        first_block: what becomes of the first block of a stage. "shape": nothing is left out, strides may differ;
            "stride": layers of different stride do not share; "skip": its layers are left out.
        min_members: smallest group to report.
        roles: only layers with one of these roles.
        kernel: only layers of this kernel size.
        include, exclude: regular expressions searched in layer names; a layer needs a match of ``include`` (if
            given) and none of ``exclude``.

    Raises:
        SharefoldError: unknown ``first_block``, or an expression that does not compile.
    """
    if first_block not in FIRST_BLOCK:
        raise SharefoldError(f"first_block={first_block!r}: unknown policy: choose one of {', '.join(FIRST_BLOCK)}")
    wanted, unwanted = _patterns("include", include), _patterns("exclude", exclude)
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    found: dict[str, list[LayerRecord]] = {}
    for record in graph.layers.values():
        if first_block == "skip" and record.block_index == 0:
            continue
        if roles is not None and record.role not in roles:
            continue
        if size is not None and record.weight_shape[2:] != size:
            continue
        if wanted and not any(p.search(record.name) for p in wanted):
            continue
        if any(p.search(record.name) for p in unwanted):
            continue
        found.setdefault(_name(record, by_role, first_block == "stride"), []).append(record)
    return [_group(name, members) for name, members in found.items() if len(members) >= max(1, min_members)]


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
    depthwise = record.groups > 1 and record.weight_shape[1] == 1
    kind = "linear" if record.kind == "linear" else f"{'dw' if depthwise else 'conv'}{h}x{w}"
    if depthwise and record.in_channels == record.out_channels:
        kind += f"-{record.out_channels}"
    else:
        kind += f"-{record.in_channels}-{record.out_channels}"
        if record.groups > 1 and not depthwise:
            kind += f"-g{record.groups}"
    if by_stride and record.stride != (1, 1):
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
