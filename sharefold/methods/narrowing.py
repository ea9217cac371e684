"""The network that a plan's narrowing groups leave: what its other groups are solved and measured for."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from sharefold.calibration.calibrate import Calibration, copied
from sharefold.graph import analyze
from sharefold.methods.registry import step_named
from sharefold.methods.solved import key_of, solutions_of
from sharefold.plans import GroupPlan, Plan, Progress


def narrowed(cal: Calibration, groups: Sequence[GroupPlan]) -> Calibration:
    """A calibration, on the same images, of the calibrated network after the narrowing ``groups``; ``cal`` where there are none.

    Made once for equal groups.
    """
    if not groups:
        return cal

    def make() -> Calibration:
        network = copied(cal.original)
        narrow_(network, cal, groups)
        return cal.of(network, analyze(network, cal.example))

    return cal.solution(("narrowed", *(key_of(group) for group in groups)), make)


def narrow_(model: nn.Module, cal: Calibration, groups: Sequence[GroupPlan], progress: Progress | None = None) -> None:
    """Carries out narrowing ``groups`` on ``model``, which is the calibrated network."""
    for group, solution in zip(groups, solutions_of(cal, groups, progress), strict=True):
        step_named(group.method).install(model, group, solution)


def install_blank(model: nn.Module, plan: Plan) -> None:
    """Gives the dense ``model`` the modules and shapes of ``plan``, to be filled from a file."""
    for group in (*plan.narrowing, *plan.sharing):
        step_named(group.method).install(model, group, None)


def blank_narrowed(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of ``model`` in the widths that ``plan`` leaves, or ``model`` itself where it leaves them all."""
    if not plan.narrowing:
        return model
    network = copy.deepcopy(model)
    for group in plan.narrowing:
        step_named(group.method).install(network, group, None)
    return network
