"""Spatial SVD per layer: a column filter followed by a row filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.layers import Bank, ConvForm, SharedConv, SpatialConv
from sharefold.methods.base import Choice, Method, Solution, curve_effort, rank_grid, solve_effort
from sharefold.methods.problem import GroupProblem
from sharefold.solvers import low_rank


class Spatial(Method):
    """What[o,i,a,b] = sum_r H[o,r,b] V[r,i,a], fitted under the data norm. Options: ``rank``."""

    name = "spatial"
    paper = "https://arxiv.org/abs/1405.3866"
    smallest_group = 1

    def choices(self, problem: GroupProblem) -> list[Choice]:
        layers, form = len(problem.forms), problem.forms[0]
        height, width = form.kernel_size
        if form.groups > 1 or form.kind != "conv2d" or height == 1 or width == 1:
            return []
        per_rank = form.in_channels * height + form.out_channels * width
        ranks = rank_grid((form.out_channels * form.features - 1) // per_rank, points=24)
        if not ranks:
            return []
        points = low_rank.spatial_curve(problem.flat(), ranks, **curve_effort(form.features))
        return [Choice({"rank": p.rank}, layers * p.rank * per_rank, p.errors) for p in points]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        result = low_rank.spatial_solve(
            problem.flat(), int(options["rank"]), **solve_effort(problem.forms[0].features)
        )
        members = [
            {"vertical": v.float(), "horizontal": h.float()}
            for v, h in zip(result.vertical, result.horizontal, strict=True)
        ]
        return Solution({}, members, result.errors)

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        height, width = forms[0].kernel_size
        return {"rank": min(forms[0].in_channels * height, forms[0].out_channels * width)}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank = int(options["rank"])
        return Solution(
            {},
            [
                {
                    "vertical": torch.zeros(rank, f.in_channels, f.kernel_size[0], 1),
                    "horizontal": torch.zeros(f.out_channels, rank, 1, f.kernel_size[1]),
                }
                for f in forms
            ],
        )

    def member(
        self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> SharedConv:
        return SpatialConv(form, tensors["vertical"], tensors["horizontal"], **kept)
