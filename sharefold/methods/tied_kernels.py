"""One kernel a group and nothing else, the form of ShaResNet, kernel sharing and the tied filter bases.

Unlike :class:`~sharefold.methods.average.Tied` no scales stay in the network: those of the fit go into the BatchNorm
behind each layer, so that the parameter count is exactly the published one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import Statistics
from sharefold.graph import NetworkGraph
from sharefold.layers import Bank, ConvForm, SharedConv, TiedConv, absorb_scale, takes_scale
from sharefold.methods.alignment import align_groups
from sharefold.methods.contract import Candidate, LayerMethod, Solution
from sharefold.plans import GroupPlan
from sharefold.solvers import tie, tie_groups
from sharefold.solvers.data_norm import Problem

# Inputs of a conv group up to which every row's normal equations are solved directly (depthwise layers).
DIRECT_LIMIT = 128


@dataclass
class TiedFit:
    """``W_k ~ scale_k * weight``: weight (O, N), bias (O,) when shared, scales (K, O) or None, errors (K,)."""

    weight: Tensor
    bias: Tensor | None
    scales: Tensor | None
    errors: Tensor


class TiedKernels(LayerMethod):
    """The data-norm optimum of one kernel. Options: ``bias`` ("own" or "shared"), ``align`` (default true)."""

    name = "tied-kernels"
    paper = "https://arxiv.org/abs/1702.08782"
    option_names = frozenset({"align", "bias"})
    writes_norms = True

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        fit = fit_kernel(problem, None, None, scaled=False)
        return [Candidate({}, self.cost(problem.forms, {}), fit.errors)]

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        return _solution(problem.forms[0], fit_kernel(problem, None, None, scaled=False))

    def align(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> bool:
        return bool(plan.options.get("align", True)) and align_groups(model, graph, statistics, [plan.members])

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        share_bias = plan.options.get("bias") == "shared"
        norms = [graph.layers[name].norm for name in plan.members]
        form, fit = fit_members(model, graph, statistics, plan.members, share_bias, norms)
        return _solution(form, fit)

    @torch.no_grad()
    def finish(self, model: nn.Module, graph: NetworkGraph, plan: GroupPlan) -> None:
        for name in plan.members:
            layer = cast(TiedConv, model.get_submodule(name))
            norm = graph.layers[name].norm
            if layer.scale is not None and norm is not None:
                scale = absorb_scale(model.get_submodule(norm), layer.scale)
                layer.scale = None
                if layer.own_bias is not None:  # the scale was the kernel's alone, and the norm multiplies the bias by it, too
                    layer.own_bias.div_(scale.to(layer.own_bias))

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        if options.get("bias", "own") not in ("own", "shared"):
            raise ValueError(f"bias={options['bias']!r} is neither own nor shared")
        bank = {"weight": torch.zeros(forms[0].weight_shape)}
        if options.get("bias") == "shared":
            bank["bias"] = torch.zeros(forms[0].out_channels)
        return Solution(bank, [{} for _ in forms])

    def member(
        self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> SharedConv:
        assert bank is not None
        if hasattr(bank, "bias"):
            kept = {key: value for key, value in kept.items() if key != "bias"}
        return TiedConv(form, bank, **tensors, **kept)


def _solution(form: ConvForm, fit: TiedFit) -> Solution:
    bank = {"weight": fit.weight.reshape(form.weight_shape).float()}
    if fit.bias is not None:
        bank["bias"] = fit.bias.float()
    members: list[dict[str, Tensor]] = [{} for _ in fit.errors]
    if fit.scales is not None:
        members = [{"scale": scale.float()} for scale in fit.scales]
    return Solution(bank, members, fit.errors)


def fit_members(
    model: nn.Module, graph: NetworkGraph, statistics: Statistics, names: Sequence[str], share_bias: bool,
    norms: Sequence[str | None],
) -> tuple[ConvForm, TiedFit]:  # fmt: skip
    """One kernel for the layers ``names``; with scales where every one of the BatchNorms ``norms`` behind them takes them."""
    problem = problem_of(model, graph, names, statistics)
    layers = [model.get_submodule(name) for name in names]
    biases = means = None
    if share_bias and getattr(layers[0], "bias", None) is not None:
        biases = torch.stack([cast(Tensor, layer.bias).detach() for layer in layers]).to(problem.weights)
        means = torch.stack([statistics.means[name] for name in names]).to(problem.weights)
        # An uncentred moment counts the mean itself, which no bias of the layer's own can put right any more.
        centered = torch.tensor([statistics.centered.get(name, False) for name in names]).to(means)
        problem.moments = problem.moments + centered.view(-1, 1, 1, 1) * means.unsqueeze(3) * means.unsqueeze(2)
    scaled = biases is None and all(n is not None and takes_scale(model.get_submodule(n)) for n in norms)
    form, fit = problem.forms[0], fit_kernel(problem, biases, means, scaled)
    if fit.scales is not None and form.standardize is not None:
        # Standardisation gives every filter the same size again; of a scale its sign is left.
        fit.scales = torch.where(fit.scales < 0, -1.0, 1.0).to(fit.scales)
    return form, fit


def fit_kernel(problem: GroupProblem, biases: Tensor | None, means: Tensor | None, scaled: bool) -> TiedFit:
    """Data-norm optimum of one kernel.

    Args:
        biases: (K, O) to share as well, or None. Then the moments must not be centred.
        means: (K, G, N) mean inputs; needed with ``biases``.
        scaled: with a scale per layer and output channel.
    """
    if _equal(problem.weights) and (biases is None or _equal(biases)):
        bias = None if biases is None else biases[0]
        return TiedFit(problem.weights[0], bias, None, problem.weights.new_zeros(len(problem.weights)))
    groups = problem.moments.shape[1]
    if groups > 1:
        weight, scale = _fit_groups(problem, biases, means, scaled)
    else:
        part = problem.flat() if biases is None or means is None else _with_bias(problem.flat(), biases, means[:, 0])
        found = tie.solve(part, how="data", scale=scaled)
        weight, scale = found.weight, found.scale
    if biases is not None and means is not None:
        errors = _errors_with_bias(problem, biases, means, weight)
        return TiedFit(weight[:, :-1], weight[:, -1], None, errors)
    approximation = weight.unsqueeze(0).expand_as(problem.weights).to(problem.weights)
    if scale is not None:
        approximation = approximation * scale.unsqueeze(2).to(approximation)
    return TiedFit(weight, None, scale, problem.errors(approximation))


def _fit_groups(
    problem: GroupProblem, biases: Tensor | None, means: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor | None]:
    """Kernel (O, N), with the bias as a last column when shared, and scales (K, O) of a grouped convolution."""
    layers, groups = problem.moments.shape[:2]
    weights, moments = problem.weights.unflatten(1, (groups, -1)), problem.moments
    if biases is not None and means is not None:
        weights = torch.cat([weights, biases.reshape(layers, groups, -1, 1)], dim=3)
        moments = _augmented(moments, means)
    row_weights = problem.row_weights.unflatten(1, (groups, -1))
    if weights.shape[-1] <= DIRECT_LIMIT:
        factors = row_weights * problem.layer_weights[:, None, None]
        weight, scale = tie_groups.solve(weights, moments, factors, scaled)
        return weight.flatten(0, 1), None if scale is None else scale.flatten(1)
    parts = [
        tie.solve(
            Problem(weights[:, g], moments[:, g], row_weights[:, g], layer_weights=problem.layer_weights), scale=scaled
        )
        for g in range(groups)
    ]
    scales = [part.scale for part in parts if part.scale is not None]
    return torch.cat([part.weight for part in parts]), torch.cat(scales, dim=1) if scales else None


def _with_bias(part: Problem, biases: Tensor, means: Tensor) -> Problem:
    """The problem with the bias as one more column, whose input is the constant 1."""
    weights = torch.cat([part.weights, biases.unsqueeze(2)], dim=2)
    return Problem(weights, _augmented(part.second, means), part.row_weights, (1, 1), part.layer_weights)


def _errors_with_bias(problem: GroupProblem, biases: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """Relative errors (K,) of layers and biases against one kernel (O, N + 1) whose last column is the bias."""
    layers, groups = problem.moments.shape[:2]
    dense = torch.cat([problem.weights, biases.unsqueeze(2)], dim=2)
    moments = _augmented(problem.moments, means)

    def energy(matrices: Tensor) -> Tensor:
        blocks = matrices.unflatten(1, (groups, -1))
        rows = torch.einsum("kgrn,kgnm,kgrm->kgr", blocks, moments, blocks).reshape(layers, -1)
        return (rows * problem.row_weights).sum(1)

    return energy(dense - weight.to(dense)) / energy(dense).clamp_min(1e-30)


def _augmented(moments: Tensor, means: Tensor) -> Tensor:
    """Moments (..., N + 1, N + 1) of the inputs (moments (..., N, N), means (..., N)) and a constant 1."""
    column = torch.cat([means, torch.ones_like(means[..., :1])], dim=-1)
    return torch.cat([torch.cat([moments, means.unsqueeze(-1)], dim=-1), column.unsqueeze(-2)], dim=-2)


def _equal(tensors: Tensor) -> bool:
    return all(torch.equal(tensor, tensors[0]) for tensor in tensors[1:])
