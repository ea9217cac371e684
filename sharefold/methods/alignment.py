"""Reorders the private channels of blocks, so that layers which will share a kernel agree more beforehand.

Channels that one layer writes and that are read nowhere else may be permuted: the network computes the same. The
permutations are chosen under the data norm (see :mod:`sharefold.solvers.align`; Git Re-Basin, arXiv:2209.04836).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import group_problem
from sharefold.calibration.statistics import Statistics
from sharefold.graph import NetworkGraph
from sharefold.graph.records import Space
from sharefold.solvers import align
from sharefold.solvers.data_norm import Problem

ROUNDS = 2
Touch = tuple[int, str]  # (index of the group, "rows" | "columns")
Family = dict[int, dict[Touch, int]]  # space id -> touch -> index of the member


def align_groups(
    model: nn.Module, graph: NetworkGraph, statistics: Statistics, groups: Sequence[Sequence[str]]
) -> bool:
    """Permutes private channels of ``model`` so that tying each of ``groups`` leaves less error.

    Args:
        groups: lists of isomorphic layers; each list will share one kernel.

    Returns:
        Whether anything was permuted.
    """
    families = _families(graph, groups)
    if not families:
        return False
    moments = dict(statistics.moments([name for names in groups for name in names]))
    changed = False
    for _ in range(ROUNDS if len(families) > 1 else 1):
        moved = False
        for family in families:
            moved |= _align_family(model, graph, groups, family, moments)
        changed |= moved
        if not moved:
            break
    return changed


def _families(graph: NetworkGraph, groups: Sequence[Sequence[str]]) -> list[Family]:
    """Spaces that play the same part, for instance the inner channels of every block of a stage."""
    touches: Family = {}
    for g, names in enumerate(groups):
        for index, name in enumerate(names):
            record = graph.layers[name]
            if record.groups > 1 or record.depth > 1:
                continue
            for axis, space in (("rows", record.output_space), ("columns", record.input_space)):
                if space in graph.spaces and _permutable(graph, graph.spaces[space]):
                    touches.setdefault(space, {})[g, axis] = index
    families: list[tuple[set[Touch], Family]] = []
    for space, touched in touches.items():
        kinds = set(touched)
        merged: Family = {space: touched}
        for entry in [entry for entry in families if entry[0] & kinds]:
            kinds |= entry[0]
            merged = {**entry[1], **merged}
            families.remove(entry)
        families.append((kinds, merged))
    return [family for _, family in families if len(family) > 1 and _independent(family)]


def _independent(family: Family) -> bool:
    """Whether no layer has both its inputs and its outputs among the family's spaces (a chain, as in ConvMixer)."""
    seen: dict[tuple[int, int], str] = {}
    return all(
        seen.setdefault((group, member), axis) == axis
        for touched in family.values()
        for (group, axis), member in touched.items()
    )


def _permutable(graph: NetworkGraph, space: Space) -> bool:
    names = [*space.writers, *space.readers]
    return space.private and all(
        name in graph.layers and (name in space.through or (graph.layers[name].groups == 1 and graph.layers[name].depth == 1))
        for name in names
    )


def _align_family(
    model: nn.Module, graph: NetworkGraph, groups: Sequence[Sequence[str]], family: Family, moments: dict[str, Tensor]
) -> bool:
    spaces = list(family)
    kinds = sorted({kind for touched in family.values() for kind in touched})
    sides = [
        align.Side(_side(model, graph, groups[group], [family[s].get((group, axis)) for s in spaces], moments), axis)
        for group, axis in kinds
    ]
    found = align.solve(sides)
    moved = False
    for space, order in zip(spaces, found.permutations, strict=True):
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            continue
        permute_space(model, graph.spaces[space], order)
        for (group, axis), member in family[space].items():
            name = groups[group][member]
            if axis == "columns":
                height, width = graph.layers[name].weight_shape[2:]
                index = align.column_index(order, height * width)
                moments[name] = moments[name][:, index][:, :, index]
        moved = True
    return moved


def _side(
    model: nn.Module, graph: NetworkGraph, names: Sequence[str], members: list[int | None], moments: dict[str, Tensor]
) -> Problem:
    """The members' problem; a space that no member touches on this side gets an entry of no weight."""
    present = [names[m] for m in members if m is not None]
    norms = [graph.layers[name].norm for name in present]
    flat = group_problem(model, present, norms, [moments[name] for name in present]).flat()
    rank = iter(range(len(present)))
    pick = [next(rank) if m is not None else 0 for m in members]
    weight = torch.tensor([0.0 if m is None else 1.0 for m in members]).to(flat.weights)
    return Problem(
        flat.weights[pick], flat.second[pick], flat.row_metric[pick], flat.kernel, flat.objective_weights[pick] * weight
    )


@torch.no_grad()
def permute_space(model: nn.Module, space: Space, order: Tensor) -> None:
    """Reorders the channels of ``space`` everywhere: new channel c is the old channel ``order[c]``."""
    for name in space.writers:
        _reorder(model.get_submodule(name), order, 0)
    for name in space.through:
        if name not in space.writers:
            _reorder(model.get_submodule(name), order, 0)
    for name in space.readers:
        if name not in space.through:
            weight = cast(nn.Parameter, model.get_submodule(name).weight)
            weight.copy_(weight[:, order.to(weight.device)])


def _reorder(module: nn.Module, order: Tensor, axis: int) -> None:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.dim() > axis and tensor.shape[axis] == len(order):
            tensor.copy_(tensor.index_select(axis, order.to(tensor.device)))
