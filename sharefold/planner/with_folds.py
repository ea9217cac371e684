"""Fold and the other methods under one budget: how far to fold first, told by the price that the others pay."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from torch import nn

from sharefold.calibration.calibrate import Calibration
from sharefold.convert import convert_
from sharefold.measure import agreement
from sharefold.planner.candidates import Candidates
from sharefold.planner.fold_levels import FoldLevels
from sharefold.plans import GroupPlan, Plan

# The others' price is what the last of this share of the budget saves.
MARGIN = 0.05
# The price falls once channels are left out, which this allows for.
EASED = 0.5


def fold_widths(candidates: Candidates, picks: list[int], limit: float, divergence: float, levels: FoldLevels) -> list[int]:
    """Widths at which a unit of cost does as much damage in the hidden spaces as in the layers' factors.

    The price of the others: what the last percents of the budget change in their damages, in nats by the divergence that
    their plan was found to have. What a channel costs is scaled by what their plan leaves of each layer.

    Args:
        picks: the best without folding at ``limit``.
        divergence: of that plan, nats.
    """
    value = sum(row[pick].value for row, pick in zip(candidates.options, picks, strict=True))
    less = max(limit * (1 - MARGIN), candidates.floor)
    lower = candidates.pick(less, "")
    lost = sum(row[pick].value for row, pick in zip(candidates.options, lower, strict=True)) - value
    saved = candidates.spent(picks) - candidates.spent(lower)
    if value <= 0 or saved <= 0 or lost <= 0:
        return levels.dense
    price = EASED * lost / saved * divergence / value
    shares: dict[str, float] = {}
    for row, pick in zip(candidates.options, picks, strict=True):
        share = row[pick].cost / max(row[0].cost, 1e-30)
        shares.update((name, share) for plan in row[pick].plans for name in plan.members)
    return levels.scaled(shares).at_price(price)


def divergence_of(cal: Calibration, plan: Plan) -> float:
    """KL(original || converted) before repairs on the images that decide, nats; infinite where it is not finite."""
    trial: nn.Module = copy.deepcopy(cal.original)
    convert_(trial, plan, cal, repair=False)
    found = agreement(cal.original, trial, cal.deciding).kl
    return found if math.isfinite(found) else math.inf


def joined(folds: list[GroupPlan], rest: Plan, before: int) -> Plan:
    """One plan of the groups that narrow the network and those that were made for what they leave."""
    return replace(rest, groups=[*folds, *rest.groups], params_before=before)
