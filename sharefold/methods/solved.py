"""Solutions of a dense network's groups, each solved once for the planner's trials and the conversion."""

from __future__ import annotations

from collections.abc import Sequence

from sharefold.calibration.calibrate import Calibration
from sharefold.methods.contract import Solution
from sharefold.methods.registry import step_named
from sharefold.plans import GroupPlan, Progress


def solution_of(cal: Calibration, plan: GroupPlan) -> Solution:
    """What ``plan``'s method makes of the calibrated network, kept in ``cal``."""
    step = step_named(plan.method)
    return cal.solution(key_of(plan), lambda: step.fit(cal.original, cal.graph, cal.statistics, plan))


def solutions_of(cal: Calibration, groups: Sequence[GroupPlan], progress: Progress | None = None) -> list[Solution]:
    """The tensors of every group; moments are collected a bounded batch of groups at a time."""
    layers = {group.name: step_named(group.method).layers(cal.graph, group) for group in groups}
    solutions: list[Solution] = []
    for run in cal.statistics.batches([layers[group.name] for group in groups]) if groups else []:
        needed = [groups[index] for index in run if not cal.is_solved(key_of(groups[index]))]
        cal.statistics.moments([name for group in needed for name in layers[group.name]])
        for index in run:
            solutions.append(solution_of(cal, groups[index]))
            if progress:
                progress("solving", len(solutions), len(groups))
    return solutions


def key_of(plan: GroupPlan) -> tuple[str, str, tuple[str, ...], str]:
    """What a group's solution depends on."""
    return plan.name, plan.method, plan.members, str(sorted(plan.options.items(), key=str))
