"""Plans that are run: what the network that a plan leaves really loses, beside what was expected of it.

What is expected of folding and of sharing is told by different estimates, and both are off by factors that depend on the network
and on how much goes (EfficientNet-Lite0 at 65 %: about the same expected of both, and a divergence of .74 by sharing, .35 by
folding). So the two are run alone, each at the whole budget, and what they lose for a unit of what was expected corrects what
is expected of their mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sharefold.calibration.calibrate import Calibration, copied
from sharefold.convert import carry_out
from sharefold.options import ConvertOptions
from sharefold.plans import Plan
from sharefold.repair.confidence import Confidence
from sharefold.repair.guard import Guard
from sharefold.repair.work import Work


@dataclass(frozen=True)
class Expected:
    """A plan, and the damage that is expected of what it shares and of what it folds."""

    plan: Plan
    sharing: float
    folding: float


@dataclass(frozen=True)
class Rates:
    """Damage for each unit of what was expected of sharing and of folding."""

    sharing: float = 1.0
    folding: float = 1.0

    def of(self, sharing: float, folding: float) -> float:
        """What to expect of a plan after correction."""
        return self.sharing * sharing + self.folding * folding


class PlanRuns:
    """Runs plans of one calibration, each once: before repairs but for the scale of the logits, on the images that decide.

    Where the network returns nothing to compare, what is expected counts instead.

    Args:
        exclude: expression of what stays as it is, as in the options of the plan.
    """

    def __init__(self, cal: Calibration, exclude: str | None = None) -> None:
        self.cal, self.exclude = cal, exclude or ""
        self._known: list[tuple[Expected, float]] = []

    def loss(self, expected: Expected) -> float:
        """Divergence of the network that the plan leaves from the original."""
        if not expected.plan.groups:
            return 0.0
        for known, loss in self._known:
            if known is expected:
                return loss
        self._known.append((expected, self._run(expected)))
        return self._known[-1][1]

    def rates(self, found: Sequence[Expected]) -> Rates:
        """From a plan that only shares and one that only folds; ones where either is missing or nothing is lost."""
        shared = [one for one in found if one.sharing > 0 >= one.folding]
        folded = [one for one in found if one.folding > 0 >= one.sharing]
        if not shared or not folded:
            return Rates()
        rates = Rates(self.loss(shared[0]) / shared[0].sharing, self.loss(folded[0]) / folded[0].folding)
        return rates if all(0 < rate < math.inf for rate in (rates.sharing, rates.folding)) else Rates()

    def best(self, found: Sequence[Expected]) -> Plan:
        """The plan of least loss."""
        return found[0].plan if len(found) == 1 else min(found, key=self.loss).plan

    def _run(self, expected: Expected) -> float:
        if not self.cal.comparable:
            return expected.sharing + expected.folding
        trial, plan = copied(self.cal.original), replace(expected.plan, exclude=self.exclude)
        carry_out(trial, plan, self.cal, ConvertOptions(repair=False, config={"base": None, "pretrained_cfg": None}), {})
        guard = Guard(self.cal.decided)
        scale = Confidence(Work(self.cal, trial, plan, guard, self.cal))
        scale.settle()  # as the repairs will
        found = guard.settled(trial, scale)
        return found if math.isfinite(found) else math.inf
