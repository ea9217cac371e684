"""``--keep-agreement``: the smallest conversion whose predictions still agree with the original's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    from torch import nn

    from sharefold.convert import Conversion

LARGEST, TRIALS = 0.95, 6


def smallest_keeping(
    model: nn.Module, keep: float, attempt: Callable[[nn.Module, float], Conversion]
) -> tuple[nn.Module, Conversion]:
    """Bisects the share of parameters that stays.

    Args:
        model: the dense network; not changed.
        keep: least top-1 agreement on held-out calibration images, 0 to 1.
        attempt: converts a copy in place to a share of its parameters; raises SharefoldError below the floor.

    Returns:
        The converted copy and what was done.

    Raises:
        SharefoldError: even the largest conversion tried agrees less.
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
            if done.agreement is None:
                raise SharefoldError("--keep-agreement: this network returns no logits to compare: give --budget")
            if done.agreement >= keep:
                best, high = (candidate, done), done.plan.size
            elif best is None:
                raise SharefoldError(
                    f"--keep-agreement {keep:.4g}: at {done.plan.size:.1%} of the parameters {done.agreement:.2%} of "
                    "held-out predictions agree: ask for less, or give real or more images with --calib"
                )
            else:
                low = share
        share = (low + high) / 2
    assert best is not None
    return best
