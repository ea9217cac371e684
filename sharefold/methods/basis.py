"""Shared filter basis: one bank of filters a group, coefficients a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.layers import Bank, BasisConv, ConvForm, SharedConv
from sharefold.methods.base import Choice, Method, Solution, curve_effort, rank_grid, solve_effort
from sharefold.methods.problem import GroupProblem
from sharefold.solvers import basis
from sharefold.solvers.data_norm import Problem


class Basis(Method):
    """What_k = C_k B by alternating least squares under the data norm. Options: ``rank``."""

    name = "basis"
    paper = "https://arxiv.org/abs/2006.05066"

    def choices(self, problem: GroupProblem) -> list[Choice]:
        layers, form = len(problem.forms), problem.forms[0]
        per_rank = form.features + layers * form.out_channels
        dense = layers * form.out_channels * form.features
        ranks = rank_grid(min((dense - 1) // per_rank, form.features), points=24)
        if not ranks:
            return []
        flat = problem.flat()
        points = basis.curve(flat, ranks, **curve_effort(form.features))
        return [Choice({"rank": p.rank}, p.rank * per_rank, self._per_layer(layers, flat, p.errors)) for p in points]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        form = problem.forms[0]
        flat = problem.flat()
        result = basis.solve(flat, int(options["rank"]), **solve_effort(form.features))
        shape = (-1, *form.weight_shape[1:])
        coefficients = result.coefficients.reshape(len(problem.forms), form.out_channels, -1)
        return Solution(
            {"basis": result.basis.reshape(shape).float()},
            [{"coefficients": c.float()} for c in coefficients],
            self._per_layer(len(problem.forms), flat, result.errors),
        )

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"rank": forms[0].features}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank, form = int(options["rank"]), forms[0]
        return Solution(
            {"basis": torch.zeros(rank, *form.weight_shape[1:])},
            [{"coefficients": torch.zeros(f.out_channels, rank)} for f in forms],
        )

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        return BasisConv(form, tensors["coefficients"], bank, bias=kept.get("bias"), gain=kept.get("gain"))

    @staticmethod
    def _per_layer(layers: int, flat: Problem, errors: Tensor) -> Tensor:
        """(K,) layer errors from the (K * G,) errors of conv groups, weighted by their share of the energy."""
        energy = flat.energy.reshape(layers, -1)
        return (errors.reshape_as(energy) * energy).sum(1) / energy.sum(1).clamp_min(1e-30)
