"""Solutions of a dense network's groups, each solved once for the planner's trials and the conversion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from sharefold.graph import NetworkGraph
from sharefold.methods.contract import Solution
from sharefold.methods.registry import method_named
from sharefold.plans import GroupPlan

if TYPE_CHECKING:
    from sharefold.calibration.statistics import Statistics


def solution_of(model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
    """What ``plan``'s method makes of the dense ``model``, kept in its ``statistics``."""
    key = _key(plan)
    if key not in statistics.solved:
        statistics.solved[key] = method_named(plan.method).fit(model, graph, statistics, plan)
    return statistics.solved[key]


def is_solved(statistics: Statistics, plan: GroupPlan) -> bool:
    """Whether :func:`solution_of` knows ``plan`` already."""
    return _key(plan) in statistics.solved


def forget_others(statistics: Statistics, plans: Iterable[GroupPlan]) -> None:
    """Drops all solutions but those of ``plans``."""
    wanted = {_key(plan) for plan in plans}
    for key in list(statistics.solved):
        if key not in wanted:
            del statistics.solved[key]


def _key(plan: GroupPlan) -> str:
    return f"{plan.name} {plan.method} {plan.members} {sorted(plan.options.items(), key=str)}"
