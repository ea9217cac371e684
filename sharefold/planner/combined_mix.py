"""Folding and sharing within several budgets: as :mod:`sharefold.planner.mixed`, for several costs at once.

Folding saves parameters and multiplications alike, a shared bank parameters alone. So channels are folded towards one of the
budgets, or towards all of them, to every depth; what is left of each budget is for sharing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from sharefold.calibration.calibrate import Calibration
from sharefold.methods.narrowing import narrowed
from sharefold.options import PlanOptions
from sharefold.planner.combined import Combined, find_combined
from sharefold.planner.costs import cost_of
from sharefold.planner.fold_many import ManyLevels
from sharefold.planner.mixed import DEPTHS, WORTH
from sharefold.planner.run_plans import Expected, PlanRuns, Rates
from sharefold.plans import Plan, Progress
from sharefold.solvers.allocate_many import ManyOption, allocate_many

# So many of the most promising depths are planned on the network that they leave, until one of them meets the budgets.
TRIED = 3


@dataclass
class CombinedMixer:
    """Plans that fold and share.

    Args:
        cal: of the dense network.
        plain: what its layers may become without folding, within the bounds.
        levels: what its hidden channels cost, in the units of these bounds.
        options: with the methods that share.
    """

    cal: Calibration
    plain: Combined
    levels: ManyLevels
    options: PlanOptions
    progress: Progress | None = None

    def plan(self, budget: str) -> Plan:
        """The plan of least damage within the bounds: sharing alone, folding alone, or a mixture, as the networks that they leave
        show it.

        Raises:
            Unreachable: neither folding nor sharing nor both meet them; says the floors.
        """
        runs = PlanRuns(self.cal, self.options.exclude)
        found = self._alone(budget)
        rates = runs.rates(found)
        least = min((rates.of(one.sharing, one.folding) for one in found), default=math.inf)
        for expected, widths in sorted(self._estimates(rates), key=lambda pair: pair[0])[:TRIED]:
            if expected >= WORTH * least:
                break
            folded, _ = self._real(widths, budget)
            found += folded
            if folded:
                break
        if not found:
            found, narrowest = self._real(self.levels.narrowest, budget)
            if not found:
                raise narrowest.unreachable(budget)
        return runs.best(found)

    def _alone(self, budget: str) -> list[Expected]:
        """The plan by sharing alone and the one by folding alone, as far as they meet the bounds."""
        found = []
        picks = self.plain.chosen()
        if picks is not None:
            found.append(Expected(self.plain.plan(picks, budget), self.plain.damage(picks), 0.0))
        widths = self.levels.within(self.plain.bounds.limits)
        if widths is not None:
            found.append(Expected(self.levels.folded(widths, self.plain.bounds, budget), 0.0, self.levels.one.damage(widths)))
        return found

    def _widths(self) -> Iterator[list[int]]:
        """Every depth of folding towards each of the bounds alone and towards all, once; nothing folded is none of them."""
        seen = {tuple(self.levels.one.dense)}
        bounds = self.plain.bounds
        shares = [min(limit / cost.total, 1.0) for limit, cost in zip(bounds.limits, bounds.costs, strict=True)]
        floors = self.levels.totals(self.levels.narrowest)
        units = range(len(shares))
        for towards in [*({unit} for unit in units), set(units)]:
            for depth in range(1, DEPTHS + 1):
                limits = [
                    max(cost.total * share ** (depth / DEPTHS), floor) if unit in towards else math.inf
                    for unit, (cost, share, floor) in enumerate(zip(bounds.costs, shares, floors, strict=True))
                ]
                widths = self.levels.within(limits, steps=2)
                if widths is not None and tuple(widths) not in seen:
                    seen.add(tuple(widths))
                    yield widths

    def _estimates(self, rates: Rates) -> Iterator[tuple[float, list[int]]]:
        """Expected damage of folding to some widths and sharing together; those that cannot meet the bounds are left out."""
        plain, limits = self.plain, self.plain.bounds.limits
        dense = [[[cost.dense(name) for name in members] for members in plain.members] for cost in plain.costs]
        for widths in self._widths():
            shares = self.levels.one.layer_shares(widths)
            rest = self.levels.totals(widths)
            factors: list[list[float]] = []  # per unit, of every group: what is left of its cost
            for unit, groups in enumerate(dense):
                factors.append([])
                for members, costs in zip(plain.members, groups, strict=True):
                    left = sum(cost * shares.get(name, 1.0) for name, cost in zip(members, costs, strict=True))
                    rest[unit] -= left
                    factors[unit].append(left / max(sum(costs), 1e-300))
            rows = [
                [
                    ManyOption(tuple(cost * f for cost, f in zip(each, scale, strict=True)), option.value)
                    for each, option in zip(prices, row, strict=True)
                ]
                for prices, row, scale in zip(plain.prices, plain.options, zip(*factors, strict=True), strict=True)
            ]
            room = [limit - fixed for limit, fixed in zip(limits, rest, strict=True)]
            picks = allocate_many(rows, room, exact=False)
            if picks is not None:
                sharing = sum(row[p].value for row, p in zip(rows, picks, strict=True))
                yield rates.of(sharing, self.levels.one.damage(widths)), widths

    def _real(self, widths: Sequence[int], budget: str) -> tuple[list[Expected], Combined]:
        """The plan that folds to ``widths`` and shares what is left, where there is one; and its options."""
        folds = self.levels.one.plans(widths)
        if not folds:
            return [], self.plain
        left = narrowed(self.cal, folds)
        costs = [cost_of(unit, left.original, left.graph, left.example) for unit in self.plain.bounds.units]
        candidates = find_combined(left, self.options, costs, self.progress).within(self.plain.bounds)
        picks = candidates.chosen()
        if picks is None:
            return [], candidates
        shared = replace(candidates, method=f"{candidates.method} + fold").plan(picks, budget)
        plan = Plan([*folds, *shared.groups], self.plain.before, shared.params_after, shared.source)
        return [Expected(plan, candidates.damage(picks), self.levels.one.damage(widths))], candidates
