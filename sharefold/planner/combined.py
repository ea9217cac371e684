"""Options of all groups priced in several units, and the choice within a budget in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sharefold.calibration.calibrate import Calibration
from sharefold.options import PlanOptions
from sharefold.planner.blend import Blend, Prices
from sharefold.planner.bounds import Bounds, Unreachable
from sharefold.planner.candidates import Candidates, PricedPlans, find_candidates, left_out
from sharefold.planner.costs import Cost
from sharefold.plans import Plan, Progress
from sharefold.solvers.allocate_many import ManyOption, allocate_many
from sharefold.solvers.undominated import undominated


@dataclass(frozen=True)
class Combined(Candidates):
    """Candidates for budgets in several units at once. Made once, they serve all of them: :meth:`within`.

    Attributes:
        costs: of each unit; ``cost`` is their mean, as shares of the dense network's.
        prices: per group, of every option: what it costs in every unit.
        fixed_each: of the dense network's costs, what no option touches.
        bounds: what holds; none before :meth:`within`.
    """

    costs: tuple[Cost, ...] = ()
    prices: tuple[tuple[Prices, ...], ...] = ()
    fixed_each: Prices = ()
    bounds: Bounds = Bounds()

    def within(self, bounds: Bounds) -> Combined:
        """The same, for plans within ``bounds``."""
        return replace(self, bounds=bounds)

    def pick(self, limit: float, budget: str, factors: Sequence[float] | None = None) -> list[int]:
        """As :meth:`Candidates.pick`, within ``bounds``; ``limit`` is not looked at.

        Raises:
            Unreachable: no choice of options meets all bounds; says the floors.
        """
        found = self.chosen(factors)
        if found is None and factors is not None:  # factors change what is searched first, not what there is
            found = self.chosen()
        if found is None:
            raise self.unreachable(budget)
        return found

    def chosen(self, factors: Sequence[float] | None = None) -> list[int] | None:
        """The option of every group, least total damage first, within the bounds; None where there is none."""
        weights = [1.0] * len(self.options) if factors is None else factors
        rows = [
            [ManyOption(each, option.value * weight) for each, option in zip(prices, row, strict=True)]
            for prices, row, weight in zip(self.prices, self.options, weights, strict=True)
        ]
        return allocate_many(rows, self._room)

    @property
    def _room(self) -> list[float]:
        return [limit - fixed for limit, fixed in zip(self.bounds.limits, self.fixed_each, strict=True)]

    def spent_each(self, picks: Sequence[int]) -> list[float]:
        """Costs of the whole network with these options, in every unit."""
        chosen = [row[pick] for row, pick in zip(self.prices, picks, strict=True)]
        return [fixed + sum(each[unit] for each in chosen) for unit, fixed in enumerate(self.fixed_each)]

    def plan(self, picks: Sequence[int], budget: str) -> Plan:
        chosen = [plan for row, pick in zip(self.options, picks, strict=True) for plan in row[pick].plans]
        after = self.before - sum(g.params_before - g.params_after for g in chosen)
        source = f"budget {budget}, method {self.method}: {self.bounds.expected(self.spent_each(picks), after)}"
        return Plan(chosen, self.before, after, source)

    def unreachable(self, budget: str) -> Unreachable:
        """What to say where no choice of options meets all bounds: which part cannot be met beside the others, and the floors."""
        alone = [self._floor(unit, ()) for unit in range(len(self.costs))]
        told, limits = self.bounds.costs, self.bounds.limits
        for cost, limit, part, floor in zip(told, limits, self.bounds.parts, alone, strict=True):
            if floor is not None and limit < floor:
                return Unreachable(cost.below(limit, part, floor, self.method) + left_out(self.skipped))
        said = []
        for unit, (cost, part) in enumerate(zip(told, self.bounds.parts, strict=True)):
            others = [other for other in range(len(told)) if other != unit]
            floor = self._floor(unit, others)
            if floor is not None and floor > limits[unit]:
                beside = " and ".join(self.bounds.parts[other] for other in others)
                said.append(f"beside {beside} the floor of {part} is {_amount(cost, floor)}")
        floors = " and ".join(_amount(cost, floor or 0.0) for cost, floor in zip(told, alone, strict=True))
        return Unreachable(
            f"budget {budget}: {self.method} can meet each part on this model, not all at once: {'; '.join(said)}"
            f"{'; ' if said else ''}alone the floors are {floors}; raise a part or allow more methods{left_out(self.skipped)}"
        )

    def _floor(self, unit: int, others: Sequence[int]) -> float | None:
        """Least cost in ``unit`` within the bounds of ``others``; None where those cannot be met themselves."""
        rows = [[ManyOption(tuple(each[o] for o in others), each[unit]) for each in prices] for prices in self.prices]
        if not others:
            return self.fixed_each[unit] + sum(min(option.value for option in row) for row in rows)
        picks = allocate_many(rows, [self._room[other] for other in others])
        return None if picks is None else self.spent_each(picks)[unit]


def _amount(cost: Cost, amount: float) -> str:
    return f"{cost.text(amount)} ({amount / max(cost.total, 1e-300):.1%})"


def find_combined(
    cal: Calibration, options: PlanOptions, costs: Sequence[Cost], progress: Progress | None = None
) -> Combined:
    """As :func:`sharefold.planner.candidates.find_candidates`, priced by each of ``costs``."""
    blend = Blend(costs)
    found = find_candidates(cal, options, blend, progress)
    rows, prices = [], []
    for members, row in zip(found.members, found.options, strict=True):
        each = [blend.prices(members, option.plans) for option in row]
        kept = undominated(np.array([(*cost, option.value) for cost, option in zip(each, row, strict=True)]))
        ordered = sorted(kept.tolist(), key=lambda k: (bool(row[k].plans), -float(blend.scale @ each[k]), row[k].value))
        rows.append([PricedPlans(float(blend.scale @ each[k]), row[k].value, row[k].plans) for k in ordered])
        prices.append(tuple(each[k] for k in ordered))
    names = [name for members in found.members for name in members]
    fixed = tuple(max(cost.total - sum(cost.dense(name) for name in names), 0) for cost in costs)
    return Combined(
        rows, blend, found.fixed, found.before, found.method, found.members, found.skipped, tuple(costs), tuple(prices), fixed
    )
