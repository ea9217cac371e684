"""Factors that one layer has for itself, solved again on the inputs that the converted network gives it.

A shared bank belongs to many layers and stays as it is during the sequential refit. A layer that shares nothing can do
better than new coefficients: the weight that best turns its new inputs into the original's outputs, factored under the
moments of those inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.pairs import Gatherer
from sharefold.calibration.problem import group_problem
from sharefold.layers import SharedConv
from sharefold.methods import METHODS
from sharefold.methods.contract import LARGE_FEATURES
from sharefold.plans import GroupPlan
from sharefold.repair.lockstep import Visited
from sharefold.solvers.least_squares import PulledLeastSquares

# Pull towards the original weight, as a share of the mean diagonal of the inputs' moment.
RIDGE = 1e-3


def has_own_factors(layer: nn.Module, plan: GroupPlan) -> bool:
    """Whether the layer shares nothing, and is small enough for its factors to be solved twice."""
    if not isinstance(layer, SharedConv) or layer.bank is not None or layer.linear_part() is None:
        return False
    small = layer.form.groups == 1 and layer.form.features <= LARGE_FEATURES
    return small and plan.method in METHODS and METHODS[plan.method].smallest_group == 1


@torch.no_grad()
def solve_on_prefix(at: Visited, plan: GroupPlan, positions: int, ridge: float = RIDGE, seed: int = 0) -> None:
    """Puts the factors of min E |y - What x~|^2 into the converted network's layer.

    With S = E[x~ x~^T] and Y = E[y x~^T] the best dense weight is (Y + rho W)(S + rho I)^-1, W the original's; its
    excess error is measured by S, so that the method's own solver factors it under that norm.

    Args:
        at: the layer; its inputs are those that the converted prefix gives, its targets the original layer's outputs.
        plan: of the layer's group; method and options hold for the layer alone.
        positions: input patches a map that are drawn, with the outputs at the same places.
        seed: of the drawn positions.
    """
    layer = cast(SharedConv, at.layer)
    gatherer = Gatherer(layer.form, 1, seed, positions)
    for x, y in zip(at.place.inputs, at.place.targets, strict=True):
        gatherer.add(x, y)
    found = gatherer.result(centered=at.owner is not None)
    if found is None:
        return
    system = PulledLeastSquares(found.gram[0].double(), ridge)
    problem = group_problem(at.original, [at.name], [at.norm], [system.normal[None]])
    best = system.robust(found.cross[0].double(), problem.weights[0].to(system.normal))
    solution = METHODS[plan.method].solve(replace(problem, weights=best[None].to(problem.weights)), plan.options)
    for key, tensor in solution.members[0].items():
        cast(Tensor, getattr(layer, key)).copy_(tensor)
