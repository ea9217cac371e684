"""Plans for a file of so many bytes: how much is shared and how finely the rest is stored are decided together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from sharefold.budget import Budget
from sharefold.convert import convert_, describe, split_held_out
from sharefold.errors import SharefoldError
from sharefold.measure import agreement, model_bytes
from sharefold.plans import Plan
from sharefold.store import preview_store

if TYPE_CHECKING:
    from sharefold.planner.decide import Planner

# Shares of the parameters that compete. Entropy coding already spends few bits on what matters little, so sharing has
# to earn its place: benchmarks/bytes_cifar.py.
SHARES = (1.0, 0.75, 0.5, 0.3)
# What a file may hold beside its tensors: names, shapes and the configuration.
HEADER = 64 * 1024


def plan_bytes(planner: Planner, budget: Budget) -> Plan:
    """The plan whose file fits ``budget`` bytes and whose predictions stay nearest to the original's.

    At each of a few shares of the parameters the network is converted without repairs and rounded so that it fits;
    KL(original || rounded) on held-out calibration images decides. Shares are tried in falling order until one is
    worse than the one before it.

    Args:
        budget: bytes of the saved ``.safetensors`` file.

    Returns:
        A plan with ``store`` set, or one that changes nothing where float32 fits.

    Raises:
        SharefoldError: no share fits.
    """
    model, statistics, candidates = planner.model, planner.statistics, planner.candidates()
    limit, before = int(budget.value), candidates.before
    nothing = Plan([], before, before, f"budget {budget.text}, method {candidates.method}")
    if model_bytes(model) + HEADER <= limit:
        return nothing
    held_out, _ = split_held_out(statistics.images)
    best: tuple[float, Plan] | None = None
    refusal: SharefoldError | None = None
    for number, share in enumerate(SHARES):
        if planner.progress:
            planner.progress("fitting bytes", number, len(SHARES))
        if share < 1 and share * before < candidates.floor:
            break
        plan = nothing if share == 1 else planner.within(candidates, int(share * before), budget.text)
        trial = copy.deepcopy(model)
        if plan.groups:
            convert_(trial, plan, repair=False, statistics=statistics, graph=planner.graph, seed=planner.seed)
        else:
            trial.sharefold_config = describe(trial, plan)  # type: ignore[assignment]
        try:
            _, rounded = preview_store(trial, budget_bytes=limit, calibration=statistics.images)
        except SharefoldError as error:  # too small for so many parameters
            refusal = error
            continue
        found = agreement(model, rounded, held_out).kl
        if best is not None and found >= best[0]:
            break
        best = found, plan
    if planner.progress:
        planner.progress("fitting bytes", len(SHARES), len(SHARES))
    if best is None:
        raise SharefoldError(f"budget {budget.text} is below what a file of this network can be shrunk to") from refusal
    best[1].store = f"mixed:{limit}B"
    return best[1]
