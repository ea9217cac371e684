"""How many channels every hidden space keeps where several costs are bounded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from sharefold.methods import FOLD
from sharefold.planner.bounds import Bounds, Unreachable
from sharefold.planner.fold_levels import FoldLevels
from sharefold.plans import Plan

# Of the prices of the costs: from one alone to the other in so many steps.
STEPS = 4
BISECTIONS = 40


class ManyLevels:
    """The hidden spaces of a network, measured once, and what their channels cost in every unit.

    Args:
        levels: the same, each priced in a unit.
    """

    def __init__(self, levels: Sequence[FoldLevels]) -> None:
        self.levels = list(levels)
        self.one = self.levels[0]

    def totals(self, widths: Sequence[int]) -> list[float]:
        """Cost of the whole network with so many channels in its spaces, in every unit."""
        return [levels.total(widths) for levels in self.levels]

    @property
    def narrowest(self) -> list[int]:
        """What every space keeps at least: the floor in every unit."""
        return [row[-1] for row in self.one.choices]

    def within(self, limits: Sequence[float], steps: int = STEPS) -> list[int] | None:
        """The widths of least damage that cost at most ``limits``, infinite where nothing is bounded; None below a floor.

        For prices of some proportions to each other bisection finds the least that meet all limits. What is left of these goes
        back to where it helps most. The best of the proportions counts.

        Args:
            steps: from the one cost's price alone to the other's.
        """
        if self._fits(self.one.dense, limits):
            return self.one.dense
        if not self._fits(self.narrowest, limits):
            return None
        found = [self._filled(self._bisected(scales, limits), limits) for scales in self._scales(limits, steps)]
        return min(found, key=self._loss)

    def plan(self, bounds: Bounds, budget: str) -> Plan:
        """The plan by method fold alone within ``bounds``; ``budget`` is what the user wrote.

        Raises:
            Unreachable: below a floor, which it says. All floors are reached by the same widths.
        """
        widths = self.within(bounds.limits)
        if widths is None:
            floors = self.totals(self.narrowest)
            each = zip(bounds.costs, bounds.limits, bounds.parts, floors, strict=True)
            raise Unreachable(next(c.below(limit, part, floor, FOLD.name) for c, limit, part, floor in each if floor > limit))
        return self.folded(widths, bounds, budget)

    def folded(self, widths: Sequence[int], bounds: Bounds, budget: str) -> Plan:
        """The plan that folds to these widths, which are within ``bounds``, and does nothing else."""
        after = self.one.parameters(widths)
        source = f"budget {budget}, method {FOLD.name}: {bounds.expected(self.totals(widths), after)}"
        return Plan(self.one.plans(widths), self.one.before, after, source)

    def _fits(self, widths: Sequence[int], limits: Sequence[float]) -> bool:
        return all(total <= limit for total, limit in zip(self.totals(widths), limits, strict=True))

    def _loss(self, widths: Sequence[int]) -> float:
        rows = zip(self.one.choices, self.one.losses, widths, strict=True)
        return sum(float(losses[row.index(width)]) for row, losses, width in rows)

    @staticmethod
    def _scales(limits: Sequence[float], steps: int) -> Iterator[list[float]]:
        """Weights of the bounded costs, each over its limit, that add up to 1 before that."""
        bounded = [index for index, limit in enumerate(limits) if math.isfinite(limit)]
        for parts in itertools.product(range(steps + 1), repeat=len(bounded)):
            if sum(parts) == steps:
                scales = [0.0] * len(limits)
                for index, part in zip(bounded, parts, strict=True):
                    scales[index] = part / steps / max(limits[index], 1e-300)
                yield scales

    def _bisected(self, scales: Sequence[float], limits: Sequence[float]) -> list[int]:
        blend = self.one.blended(self.levels, scales)
        unit = max(sum(float(losses[-1]) for losses in self.one.losses), 1e-12) / max(blend.total(blend.dense), 1e-300)
        low, high, widths = -12.0, 12.0, self.narrowest
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = blend.at_price(unit * 10**middle)
            if self._fits(found, limits):
                high, widths = middle, found
            else:
                low = middle
        return widths

    def _filled(self, widths: list[int], limits: Sequence[float]) -> list[int]:
        """Gives channels back, where they save most damage for what they take of the room that is left, as long as that lasts."""
        choices, losses = self.one.choices, self.one.losses
        places = [row.index(width) for row, width in zip(choices, widths, strict=True)]
        widths = list(widths)
        while True:
            totals, slopes = self.totals(widths), [levels.slopes(widths) for levels in self.levels]
            best: tuple[float, int] | None = None
            for index, (row, values, place) in enumerate(zip(choices, losses, places, strict=True)):
                gain = float(values[place] - values[place - 1]) if place else 0.0
                if gain <= 0:
                    continue
                more = row[place - 1] - row[place]
                uses = [
                    more * slope[index] / max(limit - total, 1e-300)
                    for slope, limit, total in zip(slopes, limits, totals, strict=True)
                ]
                if max(uses) <= 1 and (best is None or gain / max(*uses, 1e-30) > best[0]):
                    best = gain / max(*uses, 1e-30), index
            if best is None:
                return widths
            changed = list(widths)
            changed[best[1]] = choices[best[1]][places[best[1]] - 1]
            if not self._fits(changed, limits):
                return widths
            places[best[1]] -= 1
            widths = changed
