"""Plans for a file of so many bytes: how much is shared and how finely the rest is stored are decided together."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from sharefold.budget import Budget
from sharefold.calibration.calibrate import Calibration
from sharefold.convert import carry_out
from sharefold.errors import SharefoldError
from sharefold.measure import count_parameters, model_bytes
from sharefold.options import ConvertOptions
from sharefold.plans import Plan, Progress
from sharefold.repair.confidence import Confidence
from sharefold.repair.guard import Guard
from sharefold.repair.work import Work
from sharefold.store import quantize_
from sharefold.store.quantize import TooFewBytes

# Shares of the parameters that compete. Entropy coding already spends few bits on what matters little, so sharing has
# to earn its place.
SHARES = (1.0, 0.75, 0.5, 0.3, 0.2, 0.12)
# Shares that may do worse than the best before the rest is not tried.
PATIENCE = 2
# Bits a weight of the network as it is below which all are tried: little of it is left then, and what fewer weights say better
# shows at the smallest shares alone. 8 kB of the demo network, .3 bits, lose .62 nats as it is, 1.44 at .75, .22 at .12.
FEW_BITS = 0.75
# Nats, or a share of what the outputs vary by. A file that says so nearly what the network says needs no sharing.
SAME = 0.003
# Errors of rounding are compensated on so many images while shares are compared. To the nearest it would be quicker, and say
# nothing: what it ruins most is mended best.
TRIAL_IMAGES = 256
# What a file may hold beside its tensors: names, shapes and the configuration.
HEADER = 64 * 1024


def plan_bytes(
    cal: Calibration, budget: Budget, source: str, within: Callable[[int], Plan | None], progress: Progress | None = None,
    free: bool = True,
) -> Plan:  # fmt: skip
    """The plan whose file fits ``budget`` bytes and whose predictions stay nearest to the original's.

    At each of a few shares of the parameters the network is converted without repairs and rounded so that it fits.
    The divergence from the original on the images that decide, and views of them, is compared. Shares are tried in falling order
    until two are worse than the best before, all of them where bits are few.

    Args:
        budget: bytes of the saved ``.safetensors`` file.
        source: what the plan says of itself.
        within: the best plan of at most so many parameters; None where there is none.
        free: whether the network may stay as it is but for rounding; else ``within`` decides for all of the parameters too.

    Returns:
        A plan with ``store`` set, or one that changes nothing where float32 fits.

    Raises:
        SharefoldError: no share fits; says about how many bytes would do.
    """
    model = cal.original
    limit, before = int(budget.value), count_parameters(model)
    nothing = Plan([], before, before, source)
    if free and model_bytes(model) + HEADER <= limit:
        return nothing
    rounding = cal.statistics.sample(TRIAL_IMAGES)
    best: tuple[float, Plan] | None = None
    refusals: list[TooFewBytes] = []
    patience = PATIENCE if 8 * limit >= FEW_BITS * before else len(SHARES)
    worse = 0
    last: Plan | None = None
    for number, share in enumerate(SHARES):
        if progress:
            progress("fitting bytes", number, len(SHARES))
        if worse == patience or (best is not None and best[0] < SAME and cal.criterion is None):
            break
        if not free and last is not None and last.params_after <= int(share * before):
            continue  # other bounds have made it as small
        plan = last = nothing if share == 1 and free else within(int(share * before))
        if plan is None:
            break
        trial = copy.deepcopy(model)
        carry_out(trial, plan, cal, ConvertOptions(repair=False), {})
        try:
            quantize_(trial, f"mixed:{limit}B", rounding, model)
        except TooFewBytes as error:
            refusals.append(error)
            continue
        found = _divergence(cal, trial, plan)
        worse = 0 if best is None or found < best[0] else worse + 1
        if not worse:
            best = found, plan
    if progress:
        progress("fitting bytes", len(SHARES), len(SHARES))
    if best is None:
        floor = f", about {min(error.least for error in refusals):,} bytes" if refusals else ""
        raise SharefoldError(f"budget {budget.text} is below what a file of this network can be shrunk to{floor}")
    best[1].store = f"mixed:{limit}B"
    return best[1]


def fits_unrounded(cal: Calibration, plan: Plan, budget: Budget) -> bool:
    """Whether the network after ``plan`` fits ``budget`` bytes in its present number types."""
    model = cal.original
    if model_bytes(model) * plan.size + HEADER > budget.value:
        return False
    trial = copy.deepcopy(model)
    carry_out(trial, plan, cal, ConvertOptions(repair=False), {})
    return model_bytes(trial) + HEADER <= budget.value


def _divergence(cal: Calibration, trial: nn.Module, plan: Plan) -> float:
    """Of ``trial`` from the original on the images that decide, at the best scale of its logits, which files get; 0 where
    nothing can be compared: the first share that fits is as good as any."""
    if not cal.comparable:
        return 0.0
    guard = Guard(cal.decided)
    scale = Confidence(Work(cal, trial, plan, guard, cal))
    scale.settle()
    return guard.settled(trial, scale)
