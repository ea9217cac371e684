"""Clustering under the data norm, at three grains: whole layers, filters, kernel slices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, CodebookConv, ConvForm, SharedConv, code_dtype
from sharefold.methods.contract import Candidate, LayerMethod, Solution, rank_grid
from sharefold.solvers import kmeans

# k-means over every slice of a stage is the slowest solver; candidates are compared after fewer rounds.
CHOICE_ROUNDS = 5


class ClusterLayers(LayerMethod):
    """Whole layers: the group falls into ``count`` sub-groups, each one kernel with scales per layer and row."""

    name = "cluster-layer"
    paper = "https://arxiv.org/abs/2210.14151"
    option_names = frozenset({"count"})
    grain = "layer"

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        dense = problem.weights.numel()
        choices = []
        for count in self.counts(problem):
            options = {"count": count}
            cost = self.cost(problem.forms, options) + self._code_bits(problem, count) / 32
            if cost < dense:
                errors = self._run(problem, count, CHOICE_ROUNDS).errors
                assert errors is not None
                choices.append(Candidate(options, cost, errors))
        return choices

    def counts(self, problem: GroupProblem) -> list[int]:
        """Codebook sizes worth trying."""
        return list(range(1, len(problem.forms))) if problem.forms[0].groups == 1 else []

    def _code_bits(self, problem: GroupProblem, count: int) -> int:
        return kmeans.cost(self.grain, count, problem.flat())[1]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        return self._run(problem, int(options["count"]), 15)

    def _run(self, problem: GroupProblem, count: int, rounds: int) -> Solution:
        layers, form = len(problem.forms), problem.forms[0]
        result = kmeans.solve(problem.flat(), count, self.grain, rounds=rounds)
        assert result.scale is not None
        codes = result.codes.reshape(layers, *self._code_shape(form)).to(code_dtype(count))
        scale = result.scale.reshape(layers, form.out_channels).float()
        book = result.codebook.float().reshape(count, -1)
        rows = book[codes.long()].reshape(problem.weights.shape)
        members = [{"codes": c, "scale": s} for c, s in zip(codes, scale, strict=True)]
        return Solution({"codebook": book}, members, problem.errors(rows * scale.unsqueeze(2)))

    def _code_shape(self, form: ConvForm) -> tuple[int, ...]:
        return ()

    def _entry(self, form: ConvForm) -> int:
        return form.out_channels * form.features

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        return {"count": sum(f.out_channels * f.features for f in forms) // self._entry(forms[0])}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        count = int(options["count"])
        members = [
            {"codes": torch.zeros(self._code_shape(f), dtype=code_dtype(count)), "scale": torch.ones(f.out_channels)}
            for f in forms
        ]
        return Solution({"codebook": torch.zeros(count, self._entry(forms[0]))}, members)

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        assert bank is not None
        return CodebookConv(form, bank, **tensors, **kept)


class ClusterFilters(ClusterLayers):
    """Filters of all layers share ``count`` codebook entries; each has its own scale."""

    name = "cluster-filter"
    paper = "https://arxiv.org/abs/1510.00149"
    grain = "filter"

    def counts(self, problem: GroupProblem) -> list[int]:
        rows = len(problem.forms) * problem.forms[0].out_channels
        return rank_grid(rows // 2, points=8, smallest=2)

    def _code_shape(self, form: ConvForm) -> tuple[int, ...]:
        return (form.out_channels,)

    def _entry(self, form: ConvForm) -> int:
        return form.features


class ClusterKernels(ClusterFilters):
    """h x w slices of all layers share ``count`` codebook entries: the fewest bytes, as integer codes."""

    name = "cluster-kernel"
    paper = "https://arxiv.org/abs/1907.05686"
    grain = "kernel"

    def counts(self, problem: GroupProblem) -> list[int]:
        form = problem.forms[0]
        taps = form.kernel_size[0] * form.kernel_size[1]
        slices = problem.weights.numel() // taps
        return rank_grid(min(slices // 4, 1024), points=5, smallest=8) if taps > 1 else []

    def _code_shape(self, form: ConvForm) -> tuple[int, ...]:
        return form.weight_shape[:2]

    def _entry(self, form: ConvForm) -> int:
        return form.kernel_size[0] * form.kernel_size[1]
