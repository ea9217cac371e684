"""One kernel for the whole group: the plain mean, or the data-norm optimum with scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, ConvForm, SharedConv, TiedConv
from sharefold.methods.contract import Candidate, LayerMethod, Solution
from sharefold.solvers import tie


class Average(LayerMethod):
    """Every member uses the mean kernel. Of a pretrained stage this is close to a reset; it is the baseline."""

    name = "average"
    paper = "https://arxiv.org/abs/2210.14151"
    option_names = frozenset({"how", "scale"})
    how = "mean"
    scale = False

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        solution = self.solve(problem, {})
        assert solution.errors is not None
        return [Candidate({}, self.cost(problem.forms, {}), solution.errors)]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        how = str(options.get("how", self.how))
        scaled = bool(options.get("scale", self.scale))
        weights, scales = [], []
        for index in range(problem.moments.shape[1]):
            part = tie.solve(problem.conv_group(index), how=how, scale=scaled)
            weights.append(part.weight)
            if part.scale is not None:
                scales.append(part.scale)
        weight = torch.cat(weights)
        members: list[dict[str, Tensor]] = [{} for _ in problem.forms]
        approximation = weight.unsqueeze(0).expand_as(problem.weights).to(problem.weights)
        if scales:
            scale = torch.cat(scales, dim=1)
            approximation = approximation * scale.unsqueeze(2).to(approximation)
            members = [{"scale": row.float()} for row in scale]
        shape = problem.forms[0].weight_shape
        return Solution({"weight": weight.reshape(shape).float()}, members, problem.errors(approximation))

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        scaled = bool(options.get("scale", self.scale))
        members = [{"scale": torch.ones(f.out_channels)} if scaled else {} for f in forms]
        return Solution({"weight": torch.zeros(forms[0].weight_shape)}, members)

    def member(
        self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> SharedConv:
        assert bank is not None
        return TiedConv(form, bank, **tensors, **kept)


class Tied(Average):
    """One kernel a group, the optimum under the data norm, with a scale per output channel and layer."""

    name = "tied"
    paper = "https://arxiv.org/abs/2212.09849"
    how = "data"
    scale = True
