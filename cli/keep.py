"""``--keep-agreement``: the smallest conversion of which it is shown that its predictions still agree with the original's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from sharefold.errors import SharefoldError
from sharefold.intervals import trials_needed, wilson

if TYPE_CHECKING:
    from torch import nn

    from sharefold.calibration.calibrate import Calibration
    from sharefold.convert import Conversion

LARGEST, TRIALS = 0.95, 6
# Held-out images, as a multiple of what suffices where all of them agree: some may disagree.
ROOM = 2


def held_out_for(keep: float) -> int:
    """How many images should decide, and be reported on, so that agreement of ``keep`` can be shown with some to spare."""
    return ROOM * trials_needed(keep)


def check_enough(cal: Calibration, keep: float) -> None:
    """Refuses what no result could show.

    Raises:
        SharefoldError: no logits, or fewer images than show ``keep`` even if all predictions agree.
    """
    if not cal.comparable:
        raise SharefoldError("--keep-agreement: this network returns no logits to compare: give --budget")
    from sharefold.calibration.parts import images_for

    needed, found = trials_needed(keep), min(len(cal.parts.decide), len(cal.parts.report))
    if found < needed:
        least = "no number of images shows that" if keep >= 1 else f"that takes {images_for(needed):,} images or more"
        raise SharefoldError(
            f"--keep-agreement {keep:.4g}: of {len(cal.images):,} calibration images {found} can be reported on, {least}: "
            "ask for less, or give more images with --calib and --calib-count"
        )


def smallest_keeping(
    model: nn.Module, keep: float, attempt: Callable[[nn.Module, float], Conversion], cal: Calibration
) -> tuple[nn.Module, Conversion]:
    """Bisects the share of parameters that stays.

    The search reads the part ``decide`` of the images. What it found is then read on ``report``, from the largest downwards
    until one fails: in that order, fixed beforehand, the error of the first promise is the error of all.

    Args:
        model: the dense network; not changed.
        keep: least top-1 agreement, 0 to 1, that the lower end of a 95 % interval must reach on both parts.
        attempt: converts a copy in place to a share of its parameters; raises SharefoldError below the floor.
        cal: of ``model``, after :func:`check_enough`.

    Returns:
        The converted copy and what was done.

    Raises:
        SharefoldError: even the largest conversion tried agrees less.
    """
    from sharefold.measure import agreement

    deciding = cal.images[cal.parts.decide]
    found: list[tuple[nn.Module, Conversion]] = []
    low, high, share = 0.0, LARGEST, LARGEST
    for _ in range(TRIALS):
        candidate = copy.deepcopy(model)
        try:
            done = attempt(candidate, share)
        except SharefoldError:
            if not found:  # not a matter of size
                raise
            low = share
        else:
            agreed = agreement(cal.original, candidate, deciding).top1
            least = wilson(agreed, len(deciding))[0]
            if least >= keep:
                found.append((candidate, done))
                high = done.plan.size
            elif not found:
                raise _too_little(keep, done, agreed, least, len(deciding))
            else:
                low = share
        share = (low + high) / 2
    kept: tuple[nn.Module, Conversion] | None = None
    for candidate, done in found:
        assert done.agreement is not None and done.agreement_interval is not None
        if done.agreement_interval[0] < keep:
            break
        kept = candidate, done
    if kept is None:
        done = found[0][1]
        assert done.agreement is not None and done.agreement_interval is not None
        raise _too_little(keep, done, done.agreement, done.agreement_interval[0], done.report_images)
    return kept


def _too_little(keep: float, done: Conversion, agreed: float, least: float, count: int) -> SharefoldError:
    return SharefoldError(
        f"--keep-agreement {keep:.4g}: at {done.plan.size:.1%} of the parameters {agreed:.2%} of predictions on {count} held-out "
        f"images agree, {least:.2%} at the lower end of a 95 % interval: ask for less, or give real or more images with --calib"
    )
