"""Joint search: the knapsack adds up damages as if groups did not meet; here the whole network's output decides."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property

import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration
from sharefold.layers.norm_fusion import norms_folded
from sharefold.measure import device_of, evaluating, first_logits, run_on
from sharefold.methods import step_named
from sharefold.methods.solved import key_of, solution_of
from sharefold.planner.candidates import Candidates
from sharefold.plans import GroupPlan, Progress
from sharefold.repair.means import absorb_means

# All trials together cost about so many passes over the calibration images: few images a trial for many groups.
PASSES = 16
IMAGES, FEWEST = 500, 24
# Of per-pixel outputs, about so many pixels a batch.
ROWS = 4096
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
    """KL(original || converted) of any picks, before repairs, on a few calibration images; nats.

    Raises:
        SharefoldError: the network returns no logits.
    """

    def __init__(self, cal: Calibration, candidates: Candidates) -> None:
        self.cal, self.candidates = cal, candidates
        images = len(cal.statistics.chosen)
        self.rounds = min(ROUNDS, int(WORK / max(self._work(), 1)))
        groups = sum(len(row) > 1 for row in candidates.options)
        count = min(IMAGES, images, max(FEWEST, PASSES * images // max(ROUNDS * groups, 1)))
        device = device_of(cal.original)
        self.batches = [batch.to(device) for batch in cal.statistics.sample(count).split(cal.statistics.batch_size)]
        self.norms = {name: record.norm for name, record in cal.graph.layers.items()}
        self.known: dict[tuple[int, ...], float] = {}

    @cached_property
    def reference(self) -> list[Tensor]:
        """The dense network's outputs; not run where no round is."""
        return self._outputs(self.cal.original)

    def kl(self, picks: Sequence[int]) -> float:
        """Of the network with these options; solved and run once."""
        key = tuple(picks)
        if key not in self.known:
            trial = copy.deepcopy(self.cal.original)
            for plan in self._plans(picks):
                step_named(plan.method).install(trial, plan, solution_of(self.cal, plan))
            absorb_means(self.cal.original, trial, self.cal.graph, self.cal.statistics.means)
            pairs = zip(self.reference, self._outputs(trial), strict=True)
            total = sum(float(F.kl_div(b, a, reduction="sum", log_target=True)) for a, b in pairs)
            self.known[key] = total / sum(len(rows) for rows in self.reference)
        return self.known[key]

    def _work(self) -> float:
        shapes = [record.weight_shape for record in self.cal.graph.layers.values()]
        return sum(float(o * (i * h * w) ** 2) for o, i, h, w in shapes)

    def forget_others(self, picks: Sequence[int]) -> None:
        """Frees the solutions that these picks do not use."""
        self.cal.forget_solutions(but=map(key_of, self._plans(picks)))

    def _plans(self, picks: Sequence[int]) -> list[GroupPlan]:
        return [plan for row, pick in zip(self.candidates.options, picks, strict=True) for plan in row[pick].plans]

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """Log-probabilities (rows, classes) of every batch."""
        with evaluating(model), norms_folded(model, self.norms):
            outputs = [first_logits(run_on(model, batch)).float() for batch in self.batches]
        rows = [logits.movedim(1, -1).flatten(0, -2) for logits in outputs]
        return [found[:: max(1, len(found) // ROWS)].log_softmax(1) for found in rows]


def search(
    candidates: Candidates, trials: Trials, limit: float, picks: list[int], progress: Progress | None = None
) -> list[int]:
    """Picks that cost at most ``limit`` and keep the joint KL small.

    From ``picks``, the knapsack's optimum, every group in turn goes one clear step down; what that really costs, over what its
    damages promised, corrects the group's damages for the next round's knapsack. Picks of a higher KL are not taken.

    Args:
        progress: called with ("searching", done, total).
    """
    factors = [1.0] * len(picks)
    best = trials.kl(picks)
    for turn in range(trials.rounds if best > SMALLEST else 0):
        ratios = _ratios(candidates, trials, picks, turn, progress)
        middle = math.exp(sum(map(math.log, ratios.values())) / max(len(ratios), 1))
        for strength in (1.0, 0.5, 0.25):
            tried = [
                factor * max(1 / MOST, min(MOST, ratios.get(index, middle) / middle)) ** strength
                for index, factor in enumerate(factors)
            ]
            found = candidates.pick(limit, "", tried)
            if trials.kl(found) < (1 - GAIN) * best:
                picks, best, factors = found, trials.kl(found), tried
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
    now, groups = trials.kl(picks), len(candidates.options)
    for index, (row, pick) in enumerate(zip(candidates.options, picks, strict=True)):
        lower = [k for k, option in enumerate(row) if option.cost < row[pick].cost and option.value > row[pick].value]
        if lower:
            step = min(lower, key=lambda k: abs(row[k].cost - (1 - STEP) * row[pick].cost))
            promised = row[step].value - row[pick].value
            true = trials.kl([*picks[:index], step, *picks[index + 1 :]]) - now
            found[index] = max(true / promised, 1e-3)
        if progress:
            progress("searching", turn * groups + index, trials.rounds * groups)
    return found
