"""What the repairs of one conversion have in common: the calibration, the converted network, its plan, and the guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import nn

from sharefold.calibration.calibrate import Calibration
from sharefold.plans import Plan, Progress
from sharefold.repair.guard import Guard, Scaled
from sharefold.repair.partial import Partial
from sharefold.repair.step_record import StepRecord


@dataclass(frozen=True)
class Work:
    """One converted network, to be repaired in place.

    Attributes:
        base: of the network that the shared layers were solved for: ``cal`` itself, or what narrowing left of it.
    """

    cal: Calibration
    model: nn.Module
    plan: Plan
    guard: Guard
    base: Calibration
    progress: Progress | None = None

    def protected(self) -> set[int]:
        """``id`` of every parameter of the converted network that has to stay as it is."""
        modules = [module for name, module in self.model.named_modules() if self.plan.protects(name)]
        return {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}


class Repair(Protocol):
    """One repair: it says whether it applies, and writes into the network; the guard keeps what helps."""

    name: str

    def refusal(self, work: Work) -> str:
        """Why it does not apply to this network; "" where it does."""

    def run(self, work: Work) -> Mapping[str, Any] | Partial | StepRecord | None:
        """Changes ``work.model``; gives details for the record, or None where no finite solution was found, or the record itself
        where it has asked the guard already."""


def repaired(work: Work, repairs: Sequence[Repair], scales: Scaled | None = None) -> list[StepRecord]:
    """Runs ``repairs`` in order, each under the guard; one record each. ``scales``: as for :meth:`Guard.attempt`."""
    records = []
    for repair in repairs:
        reason = repair.refusal(work)
        if reason:
            records.append(StepRecord(repair.name, False, reason))
        else:
            settled = None if repair is scales else scales
            records.append(work.guard.attempt(work.model, repair.name, partial(repair.run, work), settled))
    return records
