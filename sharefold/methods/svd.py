"""Low rank per layer, under the data norm: the baseline that sharing has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.layers import Bank, BasisConv, ConvForm, SharedConv
from sharefold.methods.base import Choice, Method, Solution, rank_grid
from sharefold.methods.problem import GroupProblem
from sharefold.solvers import low_rank


class Svd(Method):
    """What = C U with own filters U: truncated SVD of D W S^(1/2). Options: ``rank``."""

    name = "svd"
    paper = "https://arxiv.org/abs/2509.25136"
    smallest_group = 1
    takes_frames = True

    def choices(self, problem: GroupProblem) -> list[Choice]:
        layers, form = len(problem.forms), problem.forms[0]
        per_rank = form.features + form.out_channels
        rows = form.out_channels // form.groups
        if form.groups > 1:
            return []
        ranks = rank_grid(min((form.out_channels * form.features - 1) // per_rank, rows, form.features), points=24)
        if not ranks:
            return []
        points = low_rank.svd_curve(problem.flat(), ranks)
        return [Choice({"rank": p.rank}, layers * p.rank * per_rank, p.errors) for p in points]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        result = low_rank.svd_solve(problem.flat(), int(options["rank"]))
        shape = (-1, *problem.forms[0].weight_shape[1:])
        members = [
            {"coefficients": left.float(), "unique": right.reshape(shape).float()}
            for left, right in zip(result.left, problem.full(result.right), strict=True)
        ]
        return Solution({}, members, result.errors)

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"rank": min(forms[0].features, forms[0].out_channels // forms[0].groups)}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank = int(options["rank"])
        return Solution({}, [
            {"coefficients": torch.zeros(f.out_channels, rank), "unique": torch.zeros(rank, *f.weight_shape[1:])}
            for f in forms
        ])

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        bias, gain = kept.get("bias"), kept.get("gain")
        return BasisConv(form, tensors["coefficients"], None, unique=tensors["unique"], bias=bias, gain=gain)
