"""Roles: the place of a layer in its block, from the data flow and the shapes, not from names.

Outside of blocks
    stem        everything before the first block; without blocks, the first layer
    head        everything after the last block; without blocks, what writes a single pixel
    transition  between blocks (down-sampling convolutions of ConvNeXt, transitions of DenseNet)
    conv        the other layers of a network without blocks (VGG)

Inside a block
    downsample  on the shorter way into a residual sum
    se_reduce, se_expand
                on pooled vectors: the last layer before the gate expands, those before it reduce
    depthwise   one input channel a group
    expand, project
                pairs of 1x1 layers that widen and then narrow (Linear pairs of ConvNeXt and MLPs too), and in blocks
                with a depthwise layer the 1x1 before and after it; a k x k layer that widens right before a 1x1 that
                narrows back (FusedMBConv) expands as well
    pointwise   the 1x1 behind a depthwise layer that keeps the width, when nothing expands and no block takes a
                residual sum around it (ConvMixer, MobileNetV1)
    conv1, conv2, ... / linear1, ...
                all others in forward order: conv1, conv2 of a basic block; conv1, conv2, conv3 of a bottleneck
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from sharefold.layers import ConvForm

NAMED = ("downsample", "se_reduce", "se_expand")


def find_roles(
    order: Sequence[str],
    forms: Mapping[str, ConvForm],
    blocks: Mapping[str, str],
    known: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]],
    residual: bool,
) -> dict[str, str]:
    """Role of every layer.

    Args:
        order: layers in forward order.
        known: roles that the data flow gives (``NAMED``).
        sizes: output size of every layer.
        residual: the network's blocks take residual sums.
    """
    roles: dict[str, str] = {}
    inner = [name for name in order if blocks[name]]
    for block in dict.fromkeys(blocks[name] for name in inner):
        members = [name for name in inner if blocks[name] == block]
        roles.update({name: known[name] for name in members if name in known})
        main = [name for name in members if name not in known]
        roles.update(_main_path(main, forms, residual))
    position = {name: i for i, name in enumerate(order)}
    first, last = (position[inner[0]], position[inner[-1]]) if inner else (0, len(order))
    for i, name in enumerate(order):
        if not blocks[name]:
            roles[name] = known.get(name) or _outside(i, first, last, bool(inner), forms[name], sizes[name])
    return {name: roles[name] for name in order}


def _outside(i: int, first: int, last: int, has_blocks: bool, form: ConvForm, size: tuple[int, int]) -> str:
    if has_blocks:
        return "stem" if i < first else "head" if i > last else "transition"
    if i == 0:
        return "stem"
    return "head" if form.kind == "linear" or size == (1, 1) else "conv"


def _main_path(main: Sequence[str], forms: Mapping[str, ConvForm], residual: bool) -> dict[str, str]:
    roles: dict[str, str] = {name: "depthwise" for name in main if forms[name].depthwise}
    dense = [name for name in main if name not in roles]
    points = [name for name in dense if forms[name].kernel_size == (1, 1)]
    if roles and all(forms[name].convolves for name in main):
        roles.update(_around_depthwise(main, points, forms, roles, residual))
    else:
        for first, second in pairwise(dense):
            if first not in roles and second not in roles and _is_inverted(forms[first], forms[second]):
                roles[first], roles[second] = "expand", "project"
    counts = {"conv": 0, "linear": 0}
    for name in dense:
        if name in roles:
            continue
        kind = "conv" if forms[name].convolves else "linear"
        counts[kind] += 1
        roles[name] = f"{kind}{counts[kind]}"
    return roles


def _is_inverted(first: ConvForm, second: ConvForm) -> bool:
    if second.kernel_size != (1, 1) or first.kind != second.kind or first.groups > 1 or second.groups > 1:
        return False
    return first.out_channels == second.in_channels > max(first.in_channels, second.out_channels)


def _around_depthwise(
    main: Sequence[str], points: Sequence[str], forms: Mapping[str, ConvForm], depthwise: Mapping[str, str],
    residual: bool,
) -> dict[str, str]:  # fmt: skip
    roles: dict[str, str] = {}
    first = next(i for i, name in enumerate(main) if name in depthwise)
    for name in points:
        form = forms[name]
        narrows, widens = form.out_channels < form.in_channels, form.out_channels > form.in_channels
        if narrows or (main.index(name) > first and not (widens and name != points[-1])):
            expanded = "expand" in roles.values()
            roles[name] = "project" if narrows or expanded or residual else "pointwise"
        else:
            roles[name] = "expand"
    return roles
