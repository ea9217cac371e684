"""Factors that one layer has for itself, solved again on the inputs that the converted network gives it.

A shared bank belongs to many layers and stays as it is during the sequential refit. A layer can do better than new coefficients
with what is its own: the weight that best turns its new inputs into the original's outputs, factored under the moments of those
inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import group_problem
from sharefold.layers import BasisConv, SharedConv
from sharefold.methods import METHODS
from sharefold.methods.contract import LARGE_FEATURES
from sharefold.methods.hybrid import Hybrid
from sharefold.plans import GroupPlan
from sharefold.repair.lockstep import Visited
from sharefold.repair.samples import Samples
from sharefold.solvers.least_squares import FACTORS_PULL, PulledLeastSquares
from sharefold.solvers.moments import Moments


def has_own_factors(layer: nn.Module, plan: GroupPlan) -> bool:
    """Whether the layer shares nothing or has filters beside the shared ones, and is small enough to solve them twice."""
    if not isinstance(layer, SharedConv) or layer.linear_part() is None:
        return False
    small = layer.form.groups == 1 and layer.form.features <= LARGE_FEATURES
    method = METHODS.get(plan.method)
    alone = layer.bank is None and method is not None and method.smallest_group == 1
    return small and (alone or isinstance(method, Hybrid))


@torch.no_grad()
def own_factors(at: Visited, fit: Samples, plan: GroupPlan, ridge: float = FACTORS_PULL) -> None:
    """Puts the factors of min E |y - What x~|^2 into the converted network's layer.

    With S = E[x~ x~^T] and Y = E[y x~^T] the best dense weight is (Y + rho W)(S + rho I)^-1, W the original's; its
    excess error is measured by S, so that the method's own solver factors it under that norm.

    Args:
        at: the layer.
        fit: its samples.
        plan: of the layer's group; method and options hold for the layer alone.
    """
    layer = cast(SharedConv, at.layer)
    x, y = fit.x[:, 0], fit.y
    if at.owner is not None:
        x, y = x - x.mean(0), y - y.mean(0)
    moments = Moments()
    moments.add(x.T[None], y.T[None])
    sums = moments.pairs(centered=False)
    if sums is None:
        return
    system = PulledLeastSquares(sums.gram[0], ridge)
    problem = group_problem(at.original, [at.name], [at.norm], [system.normal[None]])
    best = system.robust(sums.cross[0], problem.weights[0].to(system.normal))
    problem, method = replace(problem, weights=best[None].to(problem.weights)), METHODS[plan.method]
    if isinstance(method, Hybrid):
        tensors = method.solve_own(problem, cast(BasisConv, layer))
    else:
        tensors = method.solve(problem, plan.options).members[0]
    for key, tensor in tensors.items():
        cast(Tensor, getattr(layer, key)).copy_(tensor)
