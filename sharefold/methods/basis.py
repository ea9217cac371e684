"""Shared filter basis: one bank of filters a group, coefficients a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.calibration.ragged import RaggedProblem
from sharefold.layers import Bank, BasisConv, ConvForm, SharedConv
from sharefold.methods.contract import Candidate, Solution, curve_effort, solve_effort
from sharefold.methods.two_factors import TwoFactors, blank_pivots, per_layer
from sharefold.solvers import shared_basis
from sharefold.solvers.interpolative import pivot


class Basis(TwoFactors):
    """What_k = C_k B by variable projection under the data norm. Options: ``rank``, ``pivoted``.

    Members may differ in width: then B is as wide as the widest and the others use its first channels.
    """

    name = "basis"
    paper = "https://arxiv.org/abs/2006.05066"
    takes_ragged = True

    def candidates(self, problem: GroupProblem | RaggedProblem) -> list[Candidate]:
        forms = problem.forms
        widest = max(form.features for form in forms)
        rows = sum(form.out_channels for form in forms)
        ranks = self.ranks(rows, widest, sum(form.out_channels * form.features for form in forms))
        if not ranks:
            return []
        flat = problem.flat().for_estimates()
        points = shared_basis.curve(flat, ranks, **curve_effort(widest))
        return [
            Candidate(self.options(p.rank), self.price(p.rank, rows, widest), per_layer(len(forms), flat, p.errors))
            for p in points
        ]

    def solve(self, problem: GroupProblem | RaggedProblem, options: dict[str, Any]) -> Solution:
        forms, flat = problem.forms, problem.flat()
        widest = max(forms, key=lambda form: form.features)
        result = shared_basis.solve(flat, int(options["rank"]), **solve_effort(widest.features))
        coefficients = result.coefficients.reshape(len(forms), -1, result.coefficients.shape[-1])
        bank = {"basis": result.basis.reshape(-1, *widest.weight_shape[1:]).float()}
        if options.get("pivoted"):
            pivots, free, mix = pivot(result.basis)
            bank, coefficients = {"basis": free.float(), "pivots": pivots.int()}, coefficients @ mix
        return Solution(
            bank,
            [{"coefficients": c[: form.out_channels].float()} for c, form in zip(coefficients, forms, strict=True)],
            per_layer(len(forms), flat, result.errors),
        )

    def columns(self, forms: list[ConvForm]) -> int:
        return max(form.features for form in forms)

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"rank": min(max(form.features for form in forms), sum(form.out_channels for form in forms))}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank, widest = int(options["rank"]), max(forms, key=lambda form: form.features)
        bank = {"basis": torch.zeros(rank, *widest.weight_shape[1:])}
        # A narrow layer that stands in for itself alone may have fewer inputs than the bank has filters.
        if options.get("pivoted") and rank < widest.features:
            bank = blank_pivots("basis", rank, widest.features)
        return Solution(
            bank,
            [{"coefficients": torch.zeros(f.out_channels, rank)} for f in forms],
        )

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        return BasisConv(form, tensors["coefficients"], bank, bias=kept.get("bias"), gain=kept.get("gain"))
