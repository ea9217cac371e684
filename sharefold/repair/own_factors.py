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

from sharefold.calibration.pairs import Gatherer
from sharefold.calibration.problem import group_problem
from sharefold.layers import BasisConv, SharedConv
from sharefold.methods import method_named
from sharefold.methods.contract import LARGE_FEATURES
from sharefold.methods.hybrid import Hybrid
from sharefold.plans import GroupPlan
from sharefold.solvers.data_norm import solve_psd

# Pull towards the original weight, as a share of the mean diagonal of the inputs' moment.
RIDGE = 1e-3


def has_own_factors(layer: nn.Module, plan: GroupPlan | None) -> bool:
    """Whether the layer shares nothing or has filters beside the shared ones, and is small enough to solve them twice."""
    if plan is None or not isinstance(layer, SharedConv) or layer.linear_part() is None:
        return False
    method = method_named(plan.method)
    alone = layer.bank is None and method.smallest_group == 1
    return (alone or isinstance(method, Hybrid)) and layer.form.groups == 1 and layer.form.features <= LARGE_FEATURES


@torch.no_grad()
def solve_on_prefix(
    original: nn.Module, model: nn.Module, name: str, norm: str | None, plan: GroupPlan, centered: bool,
    inputs: list[Tensor], targets: list[Tensor], positions: int, ridge: float = RIDGE, seed: int = 0,
) -> None:  # fmt: skip
    """Puts the factors of min E |y - What x~|^2 into ``model``'s layer ``name``.

    With S = E[x~ x~^T] and Y = E[y x~^T] the best dense weight is (Y + rho W)(S + rho I)^-1, W the original's; its
    excess error is measured by S, so that the method's own solver factors it under that norm.

    Args:
        plan: of the layer's group; method and options hold for the layer alone.
        centered: whether the means are taken out, because a bias or BatchNorm takes up their difference.
        inputs: maps (B, I, H, W) or rows (B, ..., I) that the converted prefix gives, a tensor a batch.
        targets: the original layer's outputs on the same images.
        positions: input patches a map that are drawn, with the outputs at the same places.
        seed: of the drawn positions.
    """
    layer = cast(SharedConv, model.get_submodule(name))
    gatherer = Gatherer(layer.form, 1, seed, positions)
    for x, y in zip(inputs, targets, strict=True):
        gatherer.add(x, y)
    found = gatherer.result(centered)
    if found is None:
        return
    gram, cross = found.gram[0].double(), found.cross[0].double()
    rho = ridge * gram.diagonal().mean().clamp_min(1e-12)
    gram = gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    problem = group_problem(original, [name], [norm], [gram[None]])
    best = solve_psd(gram, (cross + rho * problem.weights[0].to(cross)).T).T
    problem, method = replace(problem, weights=best[None].to(problem.weights)), method_named(plan.method)
    if isinstance(method, Hybrid):
        tensors = method.solve_own(problem, cast(BasisConv, layer))
    else:
        tensors = method.solve(problem, plan.options).members[0]
    for key, tensor in tensors.items():
        cast(Tensor, getattr(layer, key)).copy_(tensor)
