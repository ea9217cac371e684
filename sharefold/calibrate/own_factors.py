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

from sharefold.calibrate.statistics import patches_of
from sharefold.layers import ConvForm, SharedConv
from sharefold.methods import method_named
from sharefold.methods.base import LARGE_FEATURES
from sharefold.methods.problem import group_problem
from sharefold.plans import GroupPlan
from sharefold.solvers.data_norm import sample_patches, solve_psd, without_mean

# Pull towards the original weight, as a share of the mean diagonal of the inputs' moment.
RIDGE = 1e-3


def has_own_factors(layer: nn.Module, plan: GroupPlan | None) -> bool:
    """Whether the layer shares nothing, and is small enough for its factors to be solved twice."""
    if plan is None or not isinstance(layer, SharedConv) or layer.bank is not None or layer.linear_part() is None:
        return False
    return method_named(plan.method).smallest_group == 1 and layer.form.groups == 1 and layer.form.features <= LARGE_FEATURES


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
    form, size, rows = layer.form, layer.form.features, layer.form.out_channels
    gram, cross = inputs[0].new_zeros(size, size, dtype=torch.float64), inputs[0].new_zeros(rows, size, dtype=torch.float64)
    mean_x, mean_y, count = gram.new_zeros(size), gram.new_zeros(rows), 0
    for number, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        patches, outputs = _pairs(form, x, y, positions, seed + number)
        gram += (patches.T @ patches).to(gram)
        cross += (outputs.T @ patches).to(cross)
        mean_x += patches.sum(0).to(mean_x)
        mean_y += outputs.sum(0).to(mean_y)
        count += len(patches)
    gram, cross, mean_x, mean_y = gram / count, cross / count, mean_x / count, mean_y / count
    if centered:
        gram = without_mean(gram[None], mean_x[None])[0]
        cross = cross - torch.outer(mean_y, mean_x)
    rho = ridge * gram.diagonal().mean().clamp_min(1e-12)
    gram = gram + rho * torch.eye(size, dtype=gram.dtype, device=gram.device)
    problem = group_problem(original, [name], [norm], [gram[None]])
    best = solve_psd(gram, (cross + rho * problem.weights[0].to(cross)).T).T
    solution = method_named(plan.method).solve(replace(problem, weights=best[None].to(problem.weights)), plan.options)
    for key, tensor in solution.members[0].items():
        cast(Tensor, getattr(layer, key)).copy_(tensor)


def _pairs(form: ConvForm, x: Tensor, y: Tensor, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patches (P, N) of x and outputs (P, O) of y at the same drawn positions."""
    first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
    patches = patches_of(form, x, positions, first).squeeze(1)
    kernel = None if form.kind == "linear" else (1, 1)
    return patches, sample_patches(y, kernel, positions=positions, generator=second).squeeze(1)
