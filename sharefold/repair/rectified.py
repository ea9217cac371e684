"""Coefficients for what a ReLU lets through.

Where the original's value in front of a ReLU is negative, any negative value does as well. Least squares does not know
that and spends the layer's few filters on hitting it (nonlinear reconstruction: Zhang et al., "Accelerating Very Deep
Convolutional Networks for Classification and Detection", https://arxiv.org/abs/1505.06798, section 3.2). Here a value
that is rightly negative becomes its own target, the others keep theirs, and coefficients are solved again. Each round
lowers the squared error of all that should pass the ReLU and of all that passes it and should not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.repair.coefficients import Linear
from sharefold.solvers.least_squares import PulledLeastSquares
from sharefold.solvers.moments import Moments

# More of them fit the calibration images' own ReLU pattern, and hardly lower the error.
ROUNDS = 4
# A channel whose scale in the norm is this small against the others' keeps its linear solution: nothing of it passes.
SMALLEST_SCALE = 1e-3
STEPS = (1.0, 0.5, 0.25)


@dataclass(frozen=True)
class Front:
    """What is in front of the ReLU, all (G, O/G, P) or (G, O/G, 1): ``scale * output + offset`` in the converted network,
    ``target`` in the original."""

    scale: Tensor
    offset: Tensor
    target: Tensor

    def error(self, found: Tensor) -> float:
        """Mean squared difference behind the ReLU, for a layer's outputs ``found`` (G, O/G, P)."""
        behind = (self.scale * found + self.offset).relu() - self.target.relu()
        return float(behind.double().square().mean())


def rectified(responses: Tensor, front: Front, start: Linear, ridge: float) -> Linear | None:
    """The map whose outputs are best behind the ReLU, from ``start``; None where it has no finite solution.

    With z = s (C a + d) + o in front of the ReLU (a responses, s and o of ``front``) and z0 the original's: z0 where z0 > 0,
    else min(z, 0), is what C and d are fitted to, by least squares that are pulled to ``start``. The offset holds what the
    shortcut of a residual block adds, so that its last layer also makes up for the error that came through there.
    """
    usable = front.scale.abs() > SMALLEST_SCALE * front.scale.abs().mean()
    scale = torch.where(usable, front.scale, torch.ones_like(front.scale))
    mean = responses.mean(2, keepdim=True)
    centred = responses - mean
    moments = Moments()
    moments.add(centred)
    system = PulledLeastSquares(moments.covariance(), ridge)
    factor = system.factored()
    if factor is None:  # responses that are not finite
        return None
    first, before = start.weight.to(responses), start.constant.to(responses).unsqueeze(2)
    weight, constant = first, before
    for _ in range(ROUNDS):
        found = scale * (weight @ responses + constant) + front.offset
        aim = (torch.where(front.target > 0, front.target, found.clamp_max(0)) - front.offset) / scale
        mean_y = aim.mean(2, keepdim=True)
        # Only this changes from round to round: the accumulator would sum the responses' moment each time.
        cross = ((aim - mean_y) @ centred.transpose(1, 2)).double() / centred.shape[2]
        solved = torch.cholesky_solve(system.right(cross, first.double()), factor).transpose(1, 2).to(first)
        weight = torch.where(usable, solved, first)
        constant = torch.where(usable, mean_y - weight @ mean, before)
    if not bool(torch.isfinite(weight).all() and torch.isfinite(constant).all()):
        return None
    return Linear(weight.to(start.weight), constant.squeeze(2).to(start.weight))


def best_step_behind(old: Linear, new: Linear, responses: Tensor, front: Front) -> float:
    """How far to go from ``old`` to ``new`` so that the error behind the ReLU falls on these samples; 0 where it does not."""
    best, least = 0.0, front.error(old(responses))
    for step in STEPS:
        found = front.error(old.towards(new, step)(responses))
        if found < least:
            best, least = step, found
    return best
