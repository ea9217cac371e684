"""Plans for a file of so many bytes: how much is shared and how finely the rest is stored are decided together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from sharefold.budget import Budget
from sharefold.convert import convert_, describe, split_held_out
from sharefold.errors import SharefoldError
from sharefold.measure import agreement, model_bytes
from sharefold.plans import Plan
from sharefold.store import preview_store, quantize_

if TYPE_CHECKING:
    from sharefold.planner.decide import Planner

# Shares of the parameters that compete. Entropy coding already spends few bits on what matters little, so sharing has
# to earn its place: benchmarks/bytes_cifar.py.
SHARES = (1.0, 0.75, 0.5, 0.3, 0.2, 0.12)
# Nats. Rounding to the nearest, with which shares are compared, says little where it ruins all of them alike.
RUINED = 0.3
# On so many images errors are compensated for the comparison.
TRIAL_IMAGES = 256
# What a file may hold beside its tensors: names, shapes and the configuration.
HEADER = 64 * 1024

Found = tuple[float, Plan]


def plan_bytes(planner: Planner, budget: Budget) -> Plan:
    """The plan whose file fits ``budget`` bytes and whose predictions stay nearest to the original's.

    At each of a few shares of the parameters the network is converted without repairs and rounded so that it fits;
    KL(original || rounded) on held-out calibration images decides. It is rounded to the nearest values, and where those
    ruin the network (small budgets), with errors compensated, as it will be. Shares are tried in falling order until one, or
    then two, are worse than the best before.

    Args:
        budget: bytes of the saved ``.safetensors`` file.

    Returns:
        A plan with ``store`` set, or one that changes nothing where float32 fits.

    Raises:
        SharefoldError: no share fits.
    """
    limit, before = int(budget.value), planner.candidates("bytes").before
    if model_bytes(planner.model) + HEADER <= limit:
        return _nothing(planner, budget)
    best = _least(planner, budget, before, compensated=False, patience=1)
    if best[0] > RUINED:
        best = _least(planner, budget, before, compensated=True, patience=2)
    best[1].store = f"mixed:{limit}B"
    return best[1]


def _least(planner: Planner, budget: Budget, before: int, compensated: bool, patience: int) -> Found:
    best: Found | None = None
    refusal: SharefoldError | None = None
    worse = 0
    for number, share in enumerate(SHARES):
        if planner.progress:
            planner.progress("fitting bytes", number, len(SHARES))
        if worse == patience or (share < 1 and share * before < planner.candidates("bytes").floor):
            break
        try:
            found = _tried(planner, budget, share, before, compensated)
        except SharefoldError as error:  # too small for so many parameters
            refusal = error
            continue
        worse = 0 if best is None or found[0] < best[0] else worse + 1
        best = best if worse and best is not None else found
    if planner.progress:
        planner.progress("fitting bytes", len(SHARES), len(SHARES))
    if best is None:
        raise SharefoldError(f"budget {budget.text} is below what a file of this network can be shrunk to") from refusal
    return best


def _tried(planner: Planner, budget: Budget, share: float, before: int, compensated: bool) -> Found:
    """KL of the network at ``share`` of its parameters, rounded to the budget, and its plan.

    Raises:
        SharefoldError: it does not fit.
    """
    model, statistics = planner.model, planner.statistics
    plan = _nothing(planner, budget)
    if share < 1:
        plan = planner.within(planner.candidates("bytes"), int(share * before), budget.text)
    trial = copy.deepcopy(model)
    if plan.groups:
        convert_(trial, plan, repair=False, statistics=statistics, graph=planner.graph, seed=planner.seed)
    else:
        trial.sharefold_config = describe(trial, plan)  # type: ignore[assignment]
    limit, rounded = int(budget.value), trial
    if compensated:
        quantize_(trial, f"mixed:{limit}B", calibration=statistics.sample(TRIAL_IMAGES), original=model)
    else:
        rounded = preview_store(trial, budget_bytes=limit, calibration=statistics.images)[1]
    return agreement(model, rounded, split_held_out(statistics.images)[0]).kl, plan


def _nothing(planner: Planner, budget: Budget) -> Plan:
    candidates = planner.candidates("bytes")
    return Plan([], candidates.before, candidates.before, f"budget {budget.text}, method {candidates.method}")
