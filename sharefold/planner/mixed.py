"""Folding and sharing under one budget: how far channels are folded first, and what is shared of the network that remains.

In the first few per cent folding is the cheapest of all, since one error pays for parameters of two or three layers; then sharing
is. What a folded layer would lose by sharing is estimated from what the whole one would lose at the same share of its cost,
so that every depth of folding is compared in no time. The best is then planned on the network that is really left: folding takes
what was easy to spare, and the estimate does not know that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sharefold.calibration.calibrate import Calibration, copied
from sharefold.convert import carry_out
from sharefold.methods.narrowing import narrowed
from sharefold.options import ConvertOptions, PlanOptions
from sharefold.planner.candidates import Candidates, find_candidates
from sharefold.planner.costs import cost_of
from sharefold.planner.fold_levels import FoldLevels
from sharefold.plans import Plan, Progress
from sharefold.repair.confidence import Confidence
from sharefold.repair.guard import Guard
from sharefold.repair.work import Work
from sharefold.solvers import allocate as knapsack

# Depths of folding that are compared, evenly spaced in the logarithm from nothing to the whole budget.
DEPTHS = 12
# Of the damage without folding: where no more is promised, the network that is left is not planned at all.
WORTH = 0.95
# Expected damages within this factor do not tell plans apart: the networks are run.
CLOSE = 2.0


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
        """The plan of least damage that costs at most ``limit``: expected, and where that hardly differs, measured.

        Raises:
            SharefoldError: neither folding nor sharing nor both reach it; says the floor of both.
        """
        estimates = self._estimates(limit)
        found: list[tuple[float, Plan]] = []
        if limit >= self.plain.floor:
            picks = self.plain.pick(limit, budget)
            found.append((self.plain.damage(picks), self.plain.plan(picks, budget)))
        if estimates:
            best = min(estimates, key=lambda depth: estimates[depth])
            if best and (not found or estimates[best] < WORTH * found[0][0]):
                found += self._real(self._widths(best, limit), limit, budget)[0]
        if not found:
            found, floor = self._real(self._widths(DEPTHS, self.levels.floor), limit, budget)
            if not found:
                raise self.plain.refusal(limit, budget, min(self.plain.floor, floor))
        return best_of(self.cal, found)

    def _widths(self, depth: int, limit: float) -> list[int]:
        total = self.levels.cost.total
        return self.levels.within(max(total * (limit / total) ** (depth / DEPTHS), self.levels.floor))

    def _estimates(self, limit: float) -> dict[int, float]:
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
            found[depth] = value + self.levels.damage(widths)
        return found

    def _real(self, widths: Sequence[int], limit: float, budget: str) -> tuple[list[tuple[float, Plan]], float]:
        """Expected damage, and the plan that folds to ``widths`` and shares what is left, where there is one; and its floor."""
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
        return [(candidates.damage(picks) + self.levels.damage(widths), plan)], candidates.floor


def best_of(cal: Calibration, found: Sequence[tuple[float, Plan]]) -> Plan:
    """The plan of least expected damage; of those that it does not tell apart, the one of least divergence from the original,
    before repairs but for the scale of the logits, on the images that decide."""
    least = min(damage for damage, _ in found)
    close = [plan for damage, plan in found if damage <= CLOSE * least]
    if len(close) == 1 or not cal.comparable:
        return min(found, key=lambda pair: pair[0])[1]

    def divergence(plan: Plan) -> float:
        trial = copied(cal.original)
        carry_out(trial, plan, cal, ConvertOptions(repair=False), {})
        Confidence(Work(cal, trial, plan, Guard(cal.decided), cal)).settle()  # as the repairs will
        return cal.decided.divergence(trial).mean

    return min(close, key=divergence)
