"""Deeply shared filter bases: shared and own filters, a BatchNorm, then coefficients (Kang and Kim, NeurIPS 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.layers import Bank, BasisConv, ConvForm, SharedConv, checked_form, make_identity
from sharefold.methods.contract import LayerSwap, Solution
from sharefold.plans import GroupPlan
from sharefold.solvers import low_rank, shared_basis


class FilterBases(LayerSwap):
    """What_k = C_k N_k [U_k; B], N_k a BatchNorm that starts as the identity.

    Options: ``shared`` filters of the group (0: none), ``unique`` filters of every layer (0: none); ``norms``, names
    of the BatchNorms behind the layers (or null), which take the constant that N_k adds when a layer is made dense.
    """

    name = "filter-bases"
    paper = "https://arxiv.org/abs/2006.05066"
    option_names = frozenset({"shared", "unique", "norms"})
    smallest_group = 1

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        shared, unique = _counts(options)
        form = problem.forms[0]
        flat = problem.flat()
        shape = (-1, *form.weight_shape[1:])
        if shared == 0:
            own = low_rank.svd_solve(flat, unique)
            filters: Tensor | None
            filters, coefficients, errors = own.right, own.left, own.errors
            bank: dict[str, Tensor] = {}
        else:
            found = shared_basis.solve(flat, shared, unique=unique)
            filters, coefficients, errors = found.unique, found.coefficients, found.errors
            bank = {"basis": found.basis.reshape(shape).float()}
        members = [{"coefficients": c.float()} for c in coefficients]
        if filters is not None:
            for member, rows in zip(members, filters, strict=True):
                member["unique"] = rows.reshape(shape).float()
        return Solution(bank, members, errors)

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        problem = problem_of(model, graph, plan.members, statistics)
        solution = self.solve(problem, plan.options)
        for index, (name, member) in enumerate(zip(plan.members, solution.members, strict=True)):
            parts = [t.flatten(1) for t in (member.get("unique"), solution.bank.get("basis")) if t is not None]
            filters = torch.cat(parts).double()
            mean = filters @ statistics.means[name].flatten().to(filters)
            square = ((filters @ problem.moments[index, 0].to(filters)) * filters).sum(1)
            if not statistics.centered.get(name, False):
                square = square - mean.square()
            member["norm_mean"], member["norm_var"] = mean.float(), square.clamp_min(0).float()
        return solution

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        shared, unique = _counts(options)
        total, filter_shape = shared + unique, forms[0].weight_shape[1:]
        members = []
        for form in forms:
            member = {"coefficients": torch.zeros(form.out_channels, total)}
            if unique:
                member["unique"] = torch.zeros(unique, *filter_shape)
            member["norm_mean"], member["norm_var"] = torch.zeros(total), torch.ones(total)
            members.append(member)
        return Solution({"basis": torch.zeros(shared, *filter_shape)} if shared else {}, members)

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        mean, variance = tensors["norm_mean"], tensors["norm_var"]
        norm = nn.BatchNorm2d(len(mean), device=mean.device, dtype=mean.dtype)
        make_identity(norm, mean, variance)
        return BasisConv(form, tensors["coefficients"], bank, tensors.get("unique"), norm, **kept)

    @torch.no_grad()
    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        for name, norm in zip(plan.members, plan.options.get("norms") or [], strict=False):
            layer = model.get_submodule(name)
            if norm is not None and isinstance(layer.bias, nn.Parameter):
                model.get_submodule(norm).running_mean.sub_(layer.bias)  # type: ignore[union-attr,operator]
                layer.bias = None  # type: ignore[assignment]

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        super().check(model, plan)
        for name in plan.members:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
                raise SharefoldError(f"plan: group {plan.name!r}: {name} is no ungrouped convolution, which filter bases "
                                     "need: leave it out")
            if checked_form(name, layer).standardize is not None:
                raise SharefoldError(f"plan: group {plan.name!r}: {name} standardises its weight, which filters with a norm "
                                     "behind them cannot: leave it out")


def _counts(options: dict[str, Any]) -> tuple[int, int]:
    shared, unique = int(options["shared"]), int(options["unique"])
    if shared < 0 or unique < 0 or shared + unique == 0:
        raise ValueError(f"shared={shared} and unique={unique} must not be negative nor both 0")
    return shared, unique
