"""Shared Tucker factors: one projection of the input and one bank of filters a group, coefficients a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, ConvForm, SharedConv, TuckerConv
from sharefold.methods.contract import Candidate, LayerMethod, Solution, rank_grid
from sharefold.solvers import tucker_als

RANKS = 12  # tried at every width
ROUNDS = 4


class Tucker(LayerMethod):
    """What_k = C_k B kron(A, I) by alternating least squares under the data norm. Options: ``rank``, ``width``.

    A filter of the plain basis costs its N values and one coefficient a layer and output. Only where the values are the
    larger part, in small groups, does narrowing them pay; other groups get no candidates.
    """

    name = "tucker"
    paper = "https://arxiv.org/abs/1511.06530"
    option_names = frozenset({"rank", "width"})

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        layers, form = len(problem.forms), problem.forms[0]
        if not _fits_form(form) or form.features <= layers * form.out_channels:
            return []
        dense = layers * form.out_channels * form.features
        ranks = rank_grid(min(form.features, layers * form.out_channels), points=RANKS, smallest=2)
        points = tucker_als.curve(problem.flat(), ranks=ranks, als_rounds=1, als_ranks=2)
        return [Candidate({"rank": p.rank, "width": p.width}, p.cost, p.errors) for p in points if p.cost < dense]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        form = problem.forms[0]
        rank, width = int(options["rank"]), int(options["width"])
        result = tucker_als.solve(problem.flat(), rank, width, rounds=ROUNDS)
        return Solution(
            {"projection": result.projection.float(), "basis": result.basis.reshape(rank, width, *form.kernel_size).float()},
            [{"coefficients": c.float()} for c in result.coefficients],
            result.errors,
        )

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"rank": min(forms[0].features, len(forms) * forms[0].out_channels), "width": forms[0].in_channels}

    def fits(self, forms: list[ConvForm], options: dict[str, Any]) -> bool:
        height, width = forms[0].kernel_size
        return (
            _fits_form(forms[0])
            and super().fits(forms, options)
            and options["rank"] <= options["width"] * height * width
        )

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank, width, form = int(options["rank"]), int(options["width"]), forms[0]
        return Solution(
            {
                "projection": torch.zeros(width, form.in_channels),
                "basis": torch.zeros(rank, width, *form.kernel_size),
            },
            [{"coefficients": torch.zeros(f.out_channels, rank)} for f in forms],
        )

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        return TuckerConv(form, tensors["coefficients"], bank, bias=kept.get("bias"), gain=kept.get("gain"))


def _fits_form(form: ConvForm) -> bool:
    """A 1x1 kernel has no taps to keep apart from its channels: there the plain basis says the same with less."""
    return form.kind == "conv2d" and form.groups == 1 and form.kernel_size != (1, 1)
