"""``--keep``: the smallest conversion that still says what the original says, as far as was asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    from torch import nn

    from sharefold.convert import Conversion
    from sharefold.outputs import Target

LARGEST, TRIALS = 0.95, 6


def smallest_keeping(
    model: nn.Module, target: Target, attempt: Callable[[nn.Module, float], Conversion]
) -> tuple[nn.Module, Conversion]:
    """Bisects the share of parameters that stays.

    Args:
        model: the dense network; not changed.
        target: what its figures on the images that decide must reach.
        attempt: converts a copy in place to a share of its parameters; raises SharefoldError below the floor.

    Returns:
        The converted copy and what was done.

    Raises:
        SharefoldError: the network has no such figure, or even the largest conversion tried does not reach it.
    """
    best: tuple[nn.Module, Conversion] | None = None
    low, high, share = 0.0, LARGEST, LARGEST
    for _ in range(TRIALS):
        candidate = copy.deepcopy(model)
        try:
            done = attempt(candidate, share)
        except SharefoldError:
            if best is None:  # not a matter of size
                raise
            low = share
        else:
            if target.met(done.outputs):
                best, high = (candidate, done), done.plan.size
            elif best is None:
                raise SharefoldError(_refusal(target, done))
            else:
                low = share
        share = (low + high) / 2
    assert best is not None
    return best


def _refusal(target: Target, done: Conversion) -> str:
    figures = target.of(done.outputs)
    found = ", ".join(f"{figure.name} {figure.text()}" for figure in figures)
    advice = "ask for less, or give real or more images with --calib"
    if target.proven and figures[0].images < target.images:
        advice = f"so many images prove no more; ask for less, or for {5 * target.images} of them with --calib-count"
    return (
        f"--keep {target.text}: at {done.plan.size:.1%} of the parameters there is {target.metric} {found} on "
        f"{figures[0].images} images that decide: {advice}"
    )
