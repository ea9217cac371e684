"""The numbers of parameters that a plan comes to, counted on the network: a plan that was edited still says the old ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from sharefold.graph import NetworkGraph
from sharefold.layers import checked_form
from sharefold.measure import count_parameters
from sharefold.methods.checks import check_written
from sharefold.methods.contract import LayerSwap
from sharefold.methods.narrowing import blank_narrowed, install_blank
from sharefold.methods.registry import step_named
from sharefold.plans import GroupPlan, Plan

EDITED = "edited by hand"


def checked_and_counted(model: nn.Module, graph: NetworkGraph, plan: Plan) -> Plan:
    """``plan``, which somebody has written or edited, with the numbers of parameters that it comes to on the dense ``model``; its
    source says so where it had others.

    Raises:
        SharefoldError: it does not fit the model.
    """
    check_written(model, graph, plan)
    blank = copy.deepcopy(model).to("meta")
    install_blank(blank, plan)
    groups = [*plan.narrowing, *counted(blank_narrowed(model, plan), plan.sharing)]
    found = replace(plan, groups=groups, params_before=count_parameters(model), params_after=count_parameters(blank))
    if replace(plan, groups=[*plan.narrowing, *plan.sharing]) == found:
        return found
    return replace(found, source=", ".join(part for part in (plan.source.removesuffix(f", {EDITED}"), EDITED) if part))


def counted(network: nn.Module, groups: Iterable[GroupPlan]) -> list[GroupPlan]:
    """``groups`` that share, with their numbers of parameters before and after in ``network``, which narrowing has left.

    Groups of blocks keep those that they have.
    """
    return [_counted(network, group) for group in groups]


def _counted(network: nn.Module, group: GroupPlan) -> GroupPlan:
    step = step_named(group.method)
    if not isinstance(step, LayerSwap):
        return group
    forms = [checked_form(name, network.get_submodule(name)) for name in group.members]
    before = sum(math.prod(form.weight_shape) for form in forms)
    return replace(group, params_before=before, params_after=round(step.cost(forms, group.options)))
