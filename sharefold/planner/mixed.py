"""Folding and sharing under one budget: how far channels are folded first, and what is shared of the network that remains.

In the first few per cent folding is the cheapest of all, since one error pays for parameters of two or three layers; then
sharing is. What a folded layer would lose by sharing is estimated from what the whole one would lose at the same share of its
cost, and both are corrected by what sharing alone and folding alone have lost when they were run, so that every depth is
compared in no time. The best is then planned on the network that is really left: folding takes what was easy to spare, and the
estimate does not know that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharefold.calibration.calibrate import Calibration
from sharefold.methods.narrowing import narrowed
from sharefold.options import PlanOptions
from sharefold.planner.candidates import Candidates, find_candidates
from sharefold.planner.costs import cost_of
from sharefold.planner.fold_levels import FoldLevels
from sharefold.planner.run_plans import Expected, PlanRuns, Rates
from sharefold.plans import Plan, Progress
from sharefold.solvers import allocate as knapsack

# Depths of folding that are compared, evenly spaced in the logarithm from nothing to the whole budget.
DEPTHS = 12
# Of the least damage of sharing alone and folding alone: where a mixture promises no more, it is not planned at all.
WORTH = 0.95


@dataclass
class Mixer:
    """Plans that fold and share.

    Args:
        cal: of the dense network.
        plain: what its layers may become without folding.
        levels: what its hidden channels cost; in the unit of ``plain``.
        options: with the methods that share.
        unit: what is counted.
    """

    cal: Calibration
    plain: Candidates
    levels: FoldLevels
    options: PlanOptions
    unit: str
    progress: Progress | None = None

    def plan(self, limit: float, budget: str) -> Plan:
        """The plan of least damage that costs at most ``limit``: sharing alone, folding alone, or the best of their mixtures, as
        the networks that they leave show it.

        Raises:
            SharefoldError: neither folding nor sharing nor both reach it; says the floor of both.
        """
        runs = PlanRuns(self.cal, self.options.exclude)
        found = self._alone(limit, budget)
        rates = runs.rates(found)
        estimates = self._estimates(limit, rates)
        if estimates:
            best = min(estimates, key=lambda depth: estimates[depth])
            if not found or estimates[best] < WORTH * min(rates.of(one.sharing, one.folding) for one in found):
                found += self._real(self._widths(best, limit), limit, budget)[0]
        if not found:
            found, floor = self._real(self._widths(DEPTHS, self.levels.floor), limit, budget)
            if not found:
                raise self.plain.refusal(limit, budget, min(self.plain.floor, floor))
        return runs.best(found)

    def _alone(self, limit: float, budget: str) -> list[Expected]:
        """The plan by sharing alone and the one by folding alone, as far as they reach the limit."""
        found = []
        if limit >= self.plain.floor:
            picks = self.plain.pick(limit, budget)
            found.append(Expected(self.plain.plan(picks, budget), self.plain.damage(picks), 0.0))
        if limit >= self.levels.floor:
            widths = self.levels.within(limit, budget)
            found.append(Expected(self.levels.plan(widths, budget), 0.0, self.levels.damage(widths)))
        return found

    def _widths(self, depth: int, limit: float) -> list[int]:
        total = self.levels.cost.total
        return self.levels.within(max(total * (limit / total) ** (depth / DEPTHS), self.levels.floor))

    def _estimates(self, limit: float, rates: Rates) -> dict[int, float]:
        """Depth -> expected damage of folding and sharing together; those that cannot meet the limit are left out."""
        found, seen = {}, set()
        for depth in range(DEPTHS + 1):
            widths = self._widths(depth, limit)
            if tuple(widths) in seen:
                continue
            seen.add(tuple(widths))
            shares = self.levels.layer_shares(widths)
            rows, rest = [], self.levels.total(widths)
            for members, row in zip(self.plain.members, self.plain.options, strict=True):
                dense = sum(self.plain.cost.dense(name) for name in members)
                left = sum(self.plain.cost.dense(name) * shares.get(name, 1.0) for name in members)
                rest -= left
                rows.append([knapsack.Option(option.cost * left / max(dense, 1e-12), option.value) for option in row])
            if rest + sum(min(option.cost for option in row) for row in rows) > limit:
                continue
            picks = knapsack.allocate(rows, limit - rest)
            value = sum(row[pick].value for row, pick in zip(rows, picks, strict=True))
            found[depth] = rates.of(value, self.levels.damage(widths))
        return found

    def _real(self, widths: Sequence[int], limit: float, budget: str) -> tuple[list[Expected], float]:
        """The plan that folds to ``widths`` and shares what is left, where there is one; and its floor."""
        folds = self.levels.plans(widths)
        if not folds:
            return [], self.plain.floor
        left = narrowed(self.cal, folds)
        cost = cost_of(self.unit, left.original, left.graph, left.example)
        candidates = find_candidates(left, self.options, cost, self.progress)
        if limit < candidates.floor:
            return [], candidates.floor
        picks = candidates.pick(limit, budget)
        shared = candidates.plan(picks, budget)
        source = shared.source.replace(f"method {candidates.method}", f"method {candidates.method} + fold")
        plan = Plan([*folds, *shared.groups], self.plain.before, shared.params_after, source)
        return [Expected(plan, candidates.damage(picks), self.levels.damage(widths))], candidates.floor
