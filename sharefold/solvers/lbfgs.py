"""Limited-memory BFGS for well-scaled variables, where a step of length 1 is nearly always right.

Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical Programming 45, 1989. Unlike
``torch.optim.LBFGS`` it starts with the step that a unit Hessian asks for, so that an iteration is one evaluation, and it
answers with the best point that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Function = Callable[[Tensor], tuple[float, Tensor]]

MEMORY = 12
# Of the decrease that the slope promises, a step must bring this share.
ARMIJO = 1e-4
HALVINGS = 8


def minimize(function: Function, start: Tensor, *, iterations: int, tol: float = 0.0) -> tuple[Tensor, list[float]]:
    """Lowers ``function`` from ``start``.

    Args:
        function: a flat point (n,) to its value and gradient (n,); an infinite value where it has none.
        start: (n,), where the function is finite; scaled such that its Hessian is near the identity.
        iterations: most of them.
        tol: stop when two iterations on end lower the value by less than this fraction of it.

    Returns:
        The best point, and the value at the start and after every iteration; it never rises.
    """
    point = start
    value, slope = function(point)
    history = [value]
    pairs: list[tuple[Tensor, Tensor, float]] = []
    slow = 0
    for _ in range(iterations):
        direction = _direction(slope, pairs)
        along = float(slope @ direction)
        if not along < 0:
            pairs, direction = [], -slope
            along = -float(slope @ slope)
        if along == 0:
            break
        found = _search(function, point, value, direction, along)
        if found is None:
            if not pairs:
                break
            pairs = []  # what was learned of the curvature misleads: once more, straight down
            continue
        moved, value, new_slope = found
        step, change = moved - point, new_slope - slope
        curvature = float(step @ change)
        if curvature > 1e-10 * float(change @ change):
            pairs = [*pairs[1 - MEMORY :], (step, change, 1 / curvature)]
        point, slope = moved, new_slope
        history.append(value)
        slow = slow + 1 if history[-2] - value <= tol * abs(history[-2]) else 0
        if slow == 2:
            break
    return point, history


def _direction(slope: Tensor, pairs: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Minus the inverse Hessian, as the last steps tell it, times the slope; no number leaves the device on the way."""
    result, factors = -slope, []
    for step, change, inverse in reversed(pairs):
        factors.append(inverse * (step @ result))
        result = result - factors[-1] * change
    if pairs:
        _, change, inverse = pairs[-1]
        result = result / (inverse * (change @ change))
    for (step, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        result = result + (factor - inverse * (change @ result)) * step
    return result


def _search(
    function: Function, point: Tensor, value: float, direction: Tensor, along: float
) -> tuple[Tensor, float, Tensor] | None:
    """The first of ever shorter steps that lowers the value enough, with value and slope there; None if none does."""
    length = 1.0
    for _ in range(HALVINGS):
        moved = point + length * direction
        found, slope = function(moved)
        if math.isfinite(found) and found <= value + ARMIJO * length * along and bool(torch.isfinite(slope).all()):
            return moved, found, slope
        # Where the parabola through both values and the slope is least, within bounds.
        bend = found - value - length * along
        least = -along * length * length / (2 * bend) if math.isfinite(bend) and bend > 0 else 0.0
        length = min(0.5 * length, max(0.1 * length, least))
    return None
