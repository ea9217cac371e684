"""Spatial SVD per layer: a column filter followed by a row filter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, ConvForm, SharedConv, SpatialConv
from sharefold.layers.column_filters import column_shape
from sharefold.methods.contract import Candidate, Solution, curve_effort, solve_effort
from sharefold.methods.two_factors import TwoFactors, blank_pivots
from sharefold.solvers import separable
from sharefold.solvers.interpolative import pivot


class Spatial(TwoFactors):
    """What[o,i,a,b] = sum_r H[o,r,b] V[r,i,a], fitted under the data norm. Options: ``rank``, ``pivoted``."""

    name = "spatial"
    paper = "https://arxiv.org/abs/1405.3866"
    smallest_group = 1
    takes_groups = False

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        layers, form = len(problem.forms), problem.forms[0]
        height, width = form.kernel_size
        if form.groups > 1 or not form.convolves or height == 1 or width == 1:
            return []
        rows, columns = form.out_channels * width, self.columns(problem.forms)
        ranks = self.ranks(rows, columns, form.out_channels * form.features)
        if not ranks:
            return []
        points = separable.curve(problem.flat().for_estimates(), ranks, **curve_effort(form.features))
        return [Candidate(self.options(p.rank), layers * self.price(p.rank, rows, columns), p.errors) for p in points]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        result = separable.solve(problem.flat(), int(options["rank"]), **solve_effort(problem.forms[0].features))
        members = []
        for vertical, horizontal in zip(result.vertical, result.horizontal, strict=True):
            if options.get("pivoted"):
                pivots, free, mix = pivot(vertical.flatten(1))
                horizontal = torch.einsum("orxb,rs->osxb", horizontal, mix)
                members.append({"vertical": free.float(), "horizontal": horizontal.float(), "pivots": pivots.int()})
            else:
                members.append({"vertical": vertical.float(), "horizontal": horizontal.float()})
        return Solution({}, members, result.errors)

    def columns(self, forms: list[ConvForm]) -> int:
        return forms[0].features // forms[0].kernel_size[1]

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        width = forms[0].kernel_size[1]
        return {"rank": min(self.columns(forms), forms[0].out_channels * width)}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank = int(options["rank"])

        def vertical(form: ConvForm) -> dict[str, Tensor]:
            if options.get("pivoted"):
                return blank_pivots("vertical", rank, self.columns([form]))
            return {"vertical": torch.zeros(rank, *column_shape(form))}

        return Solution({}, [
            {**vertical(f), "horizontal": torch.zeros(f.out_channels, rank, 1, f.kernel_size[1])} for f in forms
        ])  # fmt: skip

    def member(
        self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> SharedConv:
        return SpatialConv(form, tensors["vertical"], tensors["horizontal"], pivots=tensors.get("pivots"), **kept)
