"""Low rank per layer, under the data norm: the baseline that sharing has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, BasisConv, ConvForm, SharedConv
from sharefold.methods.contract import Candidate, Solution
from sharefold.methods.two_factors import TwoFactors, blank_pivots
from sharefold.solvers import low_rank
from sharefold.solvers.interpolative import pivot


class Svd(TwoFactors):
    """What = C U with own filters U: truncated SVD of D W S^(1/2). Options: ``rank``, ``pivoted``."""

    name = "svd"
    paper = "https://arxiv.org/abs/2509.25136"
    smallest_group = 1
    takes_groups = False
    takes_frames = True

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        layers, form = len(problem.forms), problem.forms[0]
        if form.groups > 1:
            return []
        rows, columns = form.out_channels, form.features
        ranks = [r for r in self.ranks(rows, columns, rows * columns) if r <= rows]
        if not ranks:
            return []
        points = low_rank.svd_curve(problem.flat().for_estimates(), ranks)
        return [
            Candidate(self.options(p.rank), layers * self.price(p.rank, rows, columns), p.errors) for p in points
        ]  # fmt: skip

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        result = low_rank.svd_solve(problem.flat(), int(options["rank"]))
        shape = (-1, *problem.forms[0].weight_shape[1:])
        members = []
        for left, right in zip(result.left, problem.full(result.right), strict=True):
            if options.get("pivoted"):
                pivots, free, mix = pivot(right)
                members.append({"coefficients": (left @ mix).float(), "unique": free.float(), "pivots": pivots.int()})
            else:
                members.append({"coefficients": left.float(), "unique": right.reshape(shape).float()})
        return Solution({}, members, result.errors)

    def columns(self, forms: list[ConvForm]) -> int:
        return forms[0].features

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"rank": min(forms[0].features, forms[0].out_channels // forms[0].groups)}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank = int(options["rank"])

        def filters(form: ConvForm) -> dict[str, Tensor]:
            if options.get("pivoted"):
                return blank_pivots("unique", rank, form.features)
            return {"unique": torch.zeros(rank, *form.weight_shape[1:])}

        return Solution({}, [{"coefficients": torch.zeros(f.out_channels, rank), **filters(f)} for f in forms])

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        return BasisConv(
            form, tensors["coefficients"], None, unique=tensors["unique"], bias=kept.get("bias"), gain=kept.get("gain"),
            pivots=tensors.get("pivots"),
        )  # fmt: skip
