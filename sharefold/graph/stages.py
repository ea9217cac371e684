"""Stages: layers at one resolution between down-samplings.

All resolutions that layers write are sorted; each step down by a factor of 1.5 or more opens a stage, so stage 0 is
the highest resolution (the stem of a classifier) and parallel branches of equal resolution share a stage. A layer
belongs to the stage of the map it writes: a strided layer opens its stage. All layers of a block share the stage of
the block's last map, so the first, strided block of a ResNet stage counts to that stage as a whole, as do the layers
on pooled vectors inside a block. Pooled vectors outside of blocks belong to the stage before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Size = tuple[int, int]
_STEP = 1.5


def find_stages(
    order: Sequence[str], sizes: Mapping[str, Size], pooled: set[str], blocks: Mapping[str, str], whole: set[str]
) -> dict[str, int]:
    """Stage of every layer.

    Args:
        order: layers in forward order.
        sizes: output size of every layer.
        pooled: layers on pooled vectors, which have no resolution of their own.
        blocks: block of every layer, "" for none.
        whole: blocks that return a single map; in others every layer keeps its own stage.
    """
    levels = _levels({sizes[name] for name in order if name not in pooled})
    block_stage = {blocks[name]: levels[sizes[name]] for name in order if name not in pooled and blocks[name] in whole}
    stages: dict[str, int] = {}
    current = 0
    for name in order:
        if blocks[name] in block_stage:
            stages[name] = block_stage[blocks[name]]
        else:
            stages[name] = current if name in pooled else levels[sizes[name]]
        current = stages[name]
    return stages


def _levels(sizes: set[Size]) -> dict[Size, int]:
    levels: dict[Size, int] = {}
    level, previous = 0, 0.0
    for size in sorted(sizes, key=lambda s: (-s[0] * s[1], s)):
        side = (size[0] * size[1]) ** 0.5
        if previous and previous / side >= _STEP:
            level += 1
        levels[size], previous = level, side
    return levels


def number_blocks(
    order: Sequence[str],
    stages: Mapping[str, int],
    blocks: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...] | None],
) -> dict[str, int]:
    """Index of every block among the blocks of its stage, in forward order.

    Counting starts again where the blocks change width inside a stage, as MobileNetV2 does at 14 x 14: there, too,
    the first block is the one that the published systems treat apart.

    Args:
        shapes: output shape of every block, None when it is not one tensor.
    """
    index: dict[str, int] = {}
    counts: dict[int, tuple[object, int]] = {}
    for name in order:
        block = blocks[name]
        if not block or block in index:
            continue
        shape = shapes.get(block)
        width = shape[1:] if shape else None
        before, count = counts.get(stages[name], (width, -1))
        index[block] = count + 1 if before == width else 0
        counts[stages[name]] = (width, index[block])
    return index
