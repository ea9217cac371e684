"""Solutions of a dense network's groups, each solved once for the planner's trials and the conversion."""

from __future__ import annotations

from sharefold.calibration.calibrate import Calibration
from sharefold.methods.contract import Solution
from sharefold.methods.registry import step_named
from sharefold.plans import GroupPlan


def solution_of(cal: Calibration, plan: GroupPlan) -> Solution:
    """What ``plan``'s method makes of the calibrated network, kept in ``cal``."""
    step = step_named(plan.method)
    return cal.solution(key_of(plan), lambda: step.fit(cal.original, cal.graph, cal.statistics, plan))


def key_of(plan: GroupPlan) -> tuple[str, str, tuple[str, ...], str]:
    """What a group's solution depends on."""
    return plan.name, plan.method, plan.members, str(sorted(plan.options.items(), key=str))
