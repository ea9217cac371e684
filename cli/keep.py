"""``--keep``: the smallest conversion of which it is shown that it still says what the original says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    from torch import nn

    from sharefold.calibration.calibrate import Calibration
    from sharefold.convert import Conversion
    from sharefold.outputs import Figure, Target

LARGEST, TRIALS = 0.95, 6
# Decide and report images, each as a multiple of what suffices where all of them agree: some may disagree.
ROOM = 2


def held_out_for(target: Target) -> int:
    """How many images should decide, and be reported on, so that the target can be shown with some to spare."""
    return ROOM * target.images if target.proven else 0


def check_enough(cal: Calibration, target: Target) -> None:
    """Refuses what no result could show.

    Raises:
        SharefoldError: nothing to compare, or fewer images than show the target even if all is the same.
    """
    if not cal.comparable:
        raise SharefoldError("--keep: this network returns nothing to compare: give --budget")
    from sharefold.calibration.parts import images_for

    needed, found = target.images if target.proven else 1, min(len(cal.parts.decide), len(cal.parts.report))
    if found < needed:
        raise SharefoldError(
            f"--keep {target.text}: of {len(cal.images):,} calibration images {found} can be reported on, that takes "
            f"{images_for(needed):,} images or more: ask for less, or give more images with --calib and --calib-count"
        )


def smallest_keeping(
    model: nn.Module, target: Target, attempt: Callable[[nn.Module, float], Conversion], cal: Calibration
) -> tuple[nn.Module, Conversion]:
    """Bisects the share of parameters that stays.

    The search reads the part ``decide`` of the images. What it found is then read on ``report``, from the largest downwards
    until one fails: in that order, fixed beforehand, the error of the first promise is the error of all.

    Args:
        model: the dense network; not changed.
        target: what its figures must reach on both parts.
        attempt: converts a copy in place to a share of its parameters; raises SharefoldError below the floor.
        cal: of ``model``, after :func:`check_enough`.

    Returns:
        The converted copy and what was done.

    Raises:
        SharefoldError: the network has no such figure, or even the largest conversion tried does not reach it.
    """
    comparison = cal.comparison(cal.decide_images)
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
            figures = comparison.measure(candidate)[1]
            if target.met(figures):
                found.append((candidate, done))
                high = done.plan.size
            elif not found:
                raise _too_little(target, done, figures, "decide")
            else:
                low = share
        share = (low + high) / 2
    kept: tuple[nn.Module, Conversion] | None = None
    for candidate, done in found:
        if not target.met(done.outputs):
            break
        kept = candidate, done
    if kept is None:
        raise _too_little(target, found[0][1], found[0][1].outputs, "report")
    return kept


def _too_little(target: Target, done: Conversion, figures: Sequence[Figure], part: str) -> SharefoldError:
    """``part``: of the images, that the figures are of."""
    meant = target.of(figures)
    found = ", ".join(f"{figure.name} {figure.text()}" for figure in meant)
    return SharefoldError(
        f"--keep {target.text}: at {done.plan.size:.1%} of the parameters there is {target.metric} {found} on "
        f"{meant[0].images} {part} images: ask for less, or give real or more images with --calib"
    )
