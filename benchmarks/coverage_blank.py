"""Networks that are too large to convert for real: planned by uniform ranks, converted with blank tensors, counted and run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharefold.graph import Group, NetworkGraph
from sharefold.graph.trace import tensors_in
from sharefold.layers import checked_form
from sharefold.measure import count_parameters
from sharefold.methods import method_named, step_named
from sharefold.methods.checks import check_plan
from sharefold.planner import find_units
from sharefold.plans import GroupPlan, Plan

BUDGET = 0.5
NOTHING = "nothing to share: no layer has a cheaper form"


class Stated(Exception):
    """Why an architecture is no case for the tool, or is not converted: a reason, not a failure."""


def convert_blank(model: nn.Module, image: Tensor, graph: NetworkGraph) -> tuple[float, str]:
    """Plans without data, puts blank shared layers in place, counts them and runs the network for its output shapes.

    Raises:
        AssertionError: a count or a shape is not what was planned.
    """
    before, wanted = count_parameters(model), outputs(model, image)
    plan = uniform_plan(model, graph)
    check_plan(model, plan)
    for group in plan.groups:
        step_named(group.method).install(model, group, None)
    after, found = count_parameters(model), outputs(model, image)
    assert after == plan.params_after, f"{after:,} parameters, planned {plan.params_after:,}"
    # A detector's blank network finds another number of boxes.
    kept = len(found) == len(wanted) and all(a.shape[1:] == b.shape[1:] for a, b in zip(found, wanted, strict=True))
    assert kept, "the converted network's outputs have other shapes"
    return round(after / before, 4), above(after / before) if after > BUDGET * before else ""


def uniform_plan(model: nn.Module, graph: NetworkGraph) -> Plan:
    """Every group at the same share of the rank at which sharing stops paying, as large as the budget allows.

    Needs shapes only: groups share a basis, other layers become low-rank ones. At its floor where the budget is
    out of reach.

    Raises:
        Stated: there is nothing to share.
    """
    before = count_parameters(model)
    units = [found for unit in find_units(graph) if (found := _ranks(model, unit)) is not None]
    if not units:
        raise Stated(NOTHING)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        saved = sum(group.params_before - group.params_after for group in _at(middle, units))
        low, high = (middle, high) if before - saved <= BUDGET * before else (low, middle)
    groups = _at(low, units)
    return Plan(groups, before, before - sum(g.params_before - g.params_after for g in groups), "uniform ranks")


def _ranks(model: nn.Module, unit: Group) -> tuple[Group, str, int, int, int] | None:
    """(unit, method, its parameters, parameters of one rank, largest rank that saves any); None if none does."""
    forms = [checked_form(name, model.get_submodule(name)) for name in unit.members]
    dense = sum(form.out_channels * form.features for form in forms)
    name = "basis" if len(forms) > 1 else "svd"
    if name == "svd" and unit.groups > 1:
        return None
    method = method_named(name)
    each = method.cost(forms, {"rank": 1})
    most = min((dense - 1) // each, method.largest(forms)["rank"])
    return None if most < 1 else (unit, name, dense, each, most)


def _at(share: float, units: Sequence[tuple[Group, str, int, int, int]]) -> list[GroupPlan]:
    ranks = [max(1, int(share * most)) for *_, most in units]
    return [
        GroupPlan(unit.name, name, unit.members, {"rank": rank}, dense, rank * each, None, unit.stage, unit.role)
        for rank, (unit, name, dense, each, _) in zip(ranks, units, strict=True)
    ]


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every tensor of the network's output, whatever holds them."""
    with torch.no_grad():
        return list(tensors_in(model.eval()(images)))


def above(share: float) -> str:
    return f"{BUDGET:.0%} is out of reach: {share:.1%} is the floor"
