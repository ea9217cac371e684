"""Deeply shared filter bases (Kang and Kim, NeurIPS 2021, https://arxiv.org/abs/2006.05066).

Basic blocks: from the second block of a stage on, every 3x3 of equal width becomes own and shared filters, a
BatchNorm, and coefficients. The numbers of filters double from stage to stage. ``bases=2`` gives conv1 and conv2 a
basis each. Bottlenecks and inverted residuals: whole kernels are tied instead (``tie``), without coefficients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.graph import Group, LayerRecord, NetworkGraph, find_groups
from sharefold.layers import form_of
from sharefold.methods.filter_bases import FilterBases
from sharefold.plans import GroupPlan
from sharefold.recipes.builders import Recipe, choice, layer_form, nothing_fits, plain, square, tied_plan

NAME = "filter-bases"
TIES = ("3x3", "expand", "project")
NOT_MAIN = {"stem", "head", "transition", "downsample", "se_reduce", "se_expand"}


def build(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    tie = options["tie"]
    if tie != "none":
        parts = tie.split("+")
        for part in parts:
            choice(NAME, "tie", part, (*TIES, "none"))
        if "none" in parts or len(set(parts)) < len(parts):
            raise SharefoldError(f"recipe {NAME}: tie={tie}: join different ones of {', '.join(TIES)} by +")
        return _tied(model, graph, parts)
    if options["bases"] not in (1, 2):
        raise SharefoldError(f"recipe {NAME}: bases={options['bases']}: give 1 or 2")
    if options["shared"] + options["unique"] == 0:
        raise SharefoldError(f"recipe {NAME}: shared=0,unique=0 leaves no filters: raise one of them")
    return _bases(model, graph, options)


def _bases(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    found = find_groups(graph, by_role=options["bases"] == 2, first_block="skip", kernel=3)
    # While it trains, such a layer runs its filters by themselves, and only a composed weight can be standardised.
    groups = _kept(found, model, graph, lambda record: _is_3x3(record) and not _standardised(model, record))
    if not groups:
        if _kept(found, model, graph, _is_3x3):
            raise nothing_fits(NAME, "its 3x3 convolutions standardise their weights, as no basis with a norm can (see tie=3x3)")
        raise nothing_fits(
            NAME,
            "it needs stages with 3x3 convolutions of equal width and stride 1 behind their first "
            "block (for MobileNets and the like, see tie=expand)",
        )
    widths = list(dict.fromkeys(group.weight_shape[0] for group in groups))
    method = FilterBases()
    plans = []
    for group in groups:
        factor = 2 ** widths.index(group.weight_shape[0])
        counts = {"shared": options["shared"] * factor, "unique": options["unique"] * factor}
        forms = [layer_form(model, name) for name in group.members]
        _check_counts(group, counts)
        before = sum(form.out_channels * form.features for form in forms)
        settings = {**counts, "norms": [_absorber(model, graph.layers[name]) for name in group.members]}
        plans.append(
            GroupPlan(
                group.name,
                method.name,
                group.members,
                settings,
                before,
                method.cost(forms, counts),
                None,
                group.stage,
                group.role,
            )
        )
    return plans


def _absorber(model: nn.Module, record: LayerRecord) -> str | None:
    """The norm behind a layer without bias that can take a constant in its running mean."""
    if record.bias or record.norm is None:
        return None
    return record.norm if getattr(model.get_submodule(record.norm), "running_mean", None) is not None else None


def _check_counts(group: Group, counts: dict[str, int]) -> None:
    rows, inputs, height, width = group.weight_shape
    columns = inputs * height * width
    largest = min(columns, len(group.members) * rows)
    if counts["shared"] > largest or counts["unique"] > min(rows, columns):
        raise SharefoldError(
            f"recipe {NAME}: {counts['shared']} shared and {counts['unique']} own filters in {group.name} are more "
            f"than the {largest} and {min(rows, columns)} that its layers span: lower shared or unique"
        )


def _tied(model: nn.Module, graph: NetworkGraph, parts: list[str]) -> list[GroupPlan]:
    tests = {"3x3": _is_3x3, "expand": _is_expand, "project": _is_project}
    groups: list[Group] = []
    for part in parts:
        found = _kept(find_groups(graph, by_role=True, first_block="skip"), model, graph, tests[part])
        if not found:
            raise nothing_fits(
                NAME, f"no stage has two or more isomorphic layers of kind {part} behind its first block"
            )
        groups += found
    return [tied_plan(model, graph, group) for group in groups]


def _kept(groups: list[Group], model: nn.Module, graph: NetworkGraph, test: Any) -> list[Group]:
    kept = []
    for group in groups:
        records = [graph.layers[name] for name in group.members]
        members = tuple(r.name for r in records if r.block and r.role not in NOT_MAIN and test(r) and plain(model, r))
        if len(members) > 1:
            kept.append(replace(group, members=members))
    return kept


def _is_3x3(record: LayerRecord) -> bool:
    return square(record, 3)


def _standardised(model: nn.Module, record: LayerRecord) -> bool:
    form = form_of(model.get_submodule(record.name))
    return form is not None and form.standardize is not None


def _is_pointwise(record: LayerRecord) -> bool:
    return record.weight_shape[2:] == (1, 1) and record.groups == 1 and record.stride == (1, 1)


def _is_expand(record: LayerRecord) -> bool:
    return _is_pointwise(record) and record.out_channels > record.in_channels


def _is_project(record: LayerRecord) -> bool:
    return _is_pointwise(record) and record.out_channels < record.in_channels


FILTER_BASES = Recipe(
    NAME,
    "https://arxiv.org/abs/2006.05066",
    {
        "shared": (16, "filters that the layers of the first stage share; doubles from stage to stage; 0 for none"),
        "unique": (1, "filters of every layer's own in the first stage; doubles likewise; 0 for none"),
        "bases": (1, "1: one basis a stage; 2: one for conv1 and one for conv2"),
        "tie": ("none", "none, or kinds of layers joined by +: 3x3, expand (widening 1x1), project (narrowing 1x1)"),
    },
    build,
)
