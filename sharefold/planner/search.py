"""Joint search: the knapsack adds up damages as if groups did not meet; here the whole network's output decides."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

from sharefold.calibration.calibrate import Calibration
from sharefold.methods import step_named
from sharefold.methods.solved import key_of, solution_of
from sharefold.planner.candidates import Candidates
from sharefold.plans import GroupPlan, Progress
from sharefold.repair.means import absorb_means
from sharefold.running import evenly

# All trials together cost about so many passes over the images that are fitted to: few images a trial for many groups.
PASSES = 16
IMAGES, FEWEST = 500, 24
ROUNDS = 3
# A round solves about every layer again. That many multiplications (rows times features squared, summed over layers) are
# spent on it at most, so that networks of wide layers get fewer rounds: ResNet-50 one, ResNet-20 all.
WORK = 5e10
# Less than this is not looked for, and a gain has to be clear: the images are few.
SMALLEST, GAIN = 1e-3, 0.02
# A group's damages are corrected by at most this factor a round.
MOST = 4.0
# A step that saves this share of what the group holds shows above the noise of a few images.
STEP = 0.2


class Trials:
    """Divergence from the original of any picks, before repairs, on a few of the decide images and their views.

    Raises:
        SharefoldError: there is nothing to compare.
    """

    def __init__(self, cal: Calibration, candidates: Candidates) -> None:
        self.cal, self.candidates = cal, candidates
        images, views = len(cal.statistics.chosen), cal.decide_views
        self.rounds = min(ROUNDS, int(WORK / max(self._work(), 1)))
        groups = sum(len(row) > 1 for row in candidates.options)
        count = min(IMAGES, max(FEWEST, PASSES * images // max(ROUNDS * groups, 1)))
        sample = views[evenly(len(views), count)]
        self.comparison = cal.comparison(sample, cal.statistics.batch_size)
        self.known: dict[tuple[int, ...], float] = {}

    def divergence(self, picks: Sequence[int]) -> float:
        """Of the network with these options; solved and run once."""
        key = tuple(picks)
        if key not in self.known:
            trial = copy.deepcopy(self.cal.original)
            for plan in self._plans(picks):
                step_named(plan.method).install(trial, plan, solution_of(self.cal, plan))
            absorb_means(self.cal.original, trial, self.cal.graph, self.cal.statistics.means)
            self.known[key] = self.comparison.divergence(trial).mean
        return self.known[key]

    def _work(self) -> float:
        shapes = [record.weight_shape for record in self.cal.graph.layers.values()]
        return sum(float(o * (i * h * w) ** 2) for o, i, h, w in shapes)

    def forget_others(self, picks: Sequence[int]) -> None:
        """Frees the solutions that these picks do not use."""
        self.cal.forget_solutions(but=map(key_of, self._plans(picks)))

    def _plans(self, picks: Sequence[int]) -> list[GroupPlan]:
        return [plan for row, pick in zip(self.candidates.options, picks, strict=True) for plan in row[pick].plans]


def search(
    candidates: Candidates, trials: Trials, limit: float, picks: list[int], progress: Progress | None = None
) -> list[int]:
    """Picks that cost at most ``limit`` and keep the joint divergence small.

    From ``picks``, the knapsack's optimum, every group in turn goes one clear step down; what that really costs, over what its
    damages promised, corrects the group's damages for the next round's knapsack. Picks of a higher divergence are not taken.

    Args:
        progress: called with ("searching", done, total).
    """
    factors = [1.0] * len(picks)
    best = trials.divergence(picks)
    for turn in range(trials.rounds if best > SMALLEST else 0):
        ratios = _ratios(candidates, trials, picks, turn, progress)
        middle = math.exp(sum(map(math.log, ratios.values())) / max(len(ratios), 1))
        for strength in (1.0, 0.5, 0.25):
            tried = [
                factor * max(1 / MOST, min(MOST, ratios.get(index, middle) / middle)) ** strength
                for index, factor in enumerate(factors)
            ]
            found = candidates.pick(limit, "", tried)
            if trials.divergence(found) < (1 - GAIN) * best:
                picks, best, factors = found, trials.divergence(found), tried
                break
        else:
            break
        trials.forget_others(picks)
    trials.forget_others(picks)
    if progress:
        progress("searching", 1, 1)
    return picks


def _ratios(
    candidates: Candidates, trials: Trials, picks: list[int], turn: int, progress: Progress | None
) -> dict[int, float]:
    """Per group that can go lower: true over promised damage of one step down, at least a thousandth."""
    found = {}
    now, groups = trials.divergence(picks), len(candidates.options)
    for index, (row, pick) in enumerate(zip(candidates.options, picks, strict=True)):
        lower = [k for k, option in enumerate(row) if option.cost < row[pick].cost and option.value > row[pick].value]
        if lower:
            step = min(lower, key=lambda k: abs(row[k].cost - (1 - STEP) * row[pick].cost))
            promised = row[step].value - row[pick].value
            true = trials.divergence([*picks[:index], step, *picks[index + 1 :]]) - now
            found[index] = max(true / promised, 1e-3)
        if progress:
            progress("searching", turn * groups + index, trials.rounds * groups)
    return found
