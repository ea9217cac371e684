"""Grouped pointwise convolutions with interleaving in place of one 1x1 layer (kEffNet)."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import problem_of
from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.layers import ConvForm, GroupedPointwise, affine, checked_form, replace_module, set_affine
from sharefold.methods.alignment import permute_space
from sharefold.methods.contract import ConversionStep, Solution
from sharefold.methods.surrogate import descend, gaussian
from sharefold.plans import GroupPlan
from sharefold.solvers import block_diagonal
from sharefold.solvers.data_norm import Problem
from sharefold.state_dicts import tensor_state

SAFE_SCALE = 1e-3
# Most alternations, and steps of each: to compare channel orders, and to fit the pair.
ORDER_EFFORT, FIT_EFFORT = (2, 5), (10, 8)


class Grouped(ConversionStep):
    """K and L fitted to the dense layer under the data norm. One member a group.

    Options: ``groups``; ``second`` (with L); ``shuffle`` (interleave); ``norm`` and ``act``, names of the norm and the
    activation behind the layer, or null; they move inside when there is an L; ``order`` (reorder the layer's input
    channels).
    """

    name = "grouped"
    paper = "https://doi.org/10.13164/mendel.2022.1.023"
    option_names = frozenset({"groups", "second", "shuffle", "norm", "act", "order"})
    writes_norms = True
    smallest_group = 1

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        if len(plan.members) != 1:
            raise SharefoldError(f"plan: group {plan.name!r}: method grouped takes one layer a group")
        name, options = plan.members[0], plan.options
        form = checked_form(name, model.get_submodule(name))
        if form.kind != "conv2d" or form.kernel_size != (1, 1) or form.groups != 1 or form.standardize is not None:
            raise SharefoldError(f"plan: group {plan.name!r}: {name} is no plain ungrouped 1x1 convolution")
        groups = options.get("groups")
        if not isinstance(groups, int) or groups < 1 or form.in_channels % groups or form.out_channels % groups:
            raise SharefoldError(f"plan: group {plan.name!r}: groups={groups} does not divide {form.in_channels} input "
                                 f"and {form.out_channels} output channels of {name}")
        for key in ("norm", "act"):
            target = options.get(key)
            if target is not None:
                try:
                    model.get_submodule(target)
                except AttributeError:
                    raise SharefoldError(f"plan: group {plan.name!r}: {key} {target!r} is no module of this "
                                         "model") from None

    def align(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> bool:
        name = plan.members[0]
        space = graph.spaces.get(graph.layers[name].input_space)
        if not plan.options.get("order") or space is None or space.frozen:
            return False
        problem = problem_of(model, graph, [name], statistics)
        order = _pair(problem.flat(), plan.options, free_inputs=True).input_order
        if order is None or torch.equal(order[0].cpu(), torch.arange(order.shape[1])):
            return False
        permute_space(model, space, order[0])
        return True

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        name, options = plan.members[0], plan.options
        problem = problem_of(model, graph, [name], statistics)
        solution = _factors(problem.flat(), options)
        layer = cast(nn.Conv2d, model.get_submodule(name))
        mean = statistics.means[name][0].to(problem.weights)
        covariance = problem.moments[0, 0]
        if not statistics.centered.get(name, False):
            covariance = covariance - torch.outer(mean, mean)
        tensors = solution.members[0]
        if not options.get("second"):
            module = _module(layer, plan, None, None)
            _set(module, tensors)
            change = layer.weight.detach().flatten(1) - cast(tuple[Tensor, Tensor], module.affine())[0]
            tensors["shift"] = change @ mean
            return solution
        norm, act = (_submodule(model, options.get(key)) for key in ("norm", "act"))
        dense = nn.Sequential(*[copy.deepcopy(m) for m in (layer, norm, act) if m is not None]).eval()
        module = _module(layer, plan, copy.deepcopy(norm), copy.deepcopy(act)).eval()
        _set(module, tensors)
        _start_norms(module, layer, norm, mean, covariance)
        if module.affine() is None:
            samples = gaussian(mean, covariance, max(4096, 8 * len(mean)))
            start, end = descend(module, dense, samples)
            solution.errors = torch.tensor([end])
            solution.options = {"fit_error_before": start}
        solution.members[0] = {"state." + key: value.detach().clone() for key, value in tensor_state(module).items()}
        return solution

    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        name, options = plan.members[0], plan.options
        layer = cast(nn.Conv2d, model.get_submodule(name))
        second = bool(options.get("second"))
        norm, act = (_submodule(model, options.get(key)) if second else None for key in ("norm", "act"))
        module = _module(layer, plan, norm, act)
        for key in ("norm", "act"):
            if second and options.get(key) is not None:
                replace_module(model, str(options[key]), nn.Identity())
        if solution is not None:
            tensors = solution.members[0]
            if second:
                module.load_state_dict({key.removeprefix("state."): value for key, value in tensors.items()})
            else:
                _set(module, tensors)
                self._absorb(model, layer, module, options, tensors["shift"])
        replace_module(model, name, module)

    @staticmethod
    def _absorb(model: nn.Module, layer: nn.Conv2d, module: GroupedPointwise, options: dict[str, Any], shift: Tensor) -> None:
        """Keeps the mean output: in K's bias, or in the norm that stays behind the layer."""
        with torch.no_grad():
            if module.first.bias is not None:
                assert layer.bias is not None
                order = _order(module)
                module.first.bias[order] = (layer.bias + shift.to(layer.bias)).to(module.first.bias)
            else:
                mean = getattr(_submodule(model, options.get("norm")), "running_mean", None)
                if mean is not None:
                    mean.sub_(shift.to(mean))

    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        name, options = plan.members[0], plan.options
        module = cast(GroupedPointwise, model.get_submodule(name))
        affine = module.affine()
        if affine is None:
            raise SharefoldError(f"expand: {name} is a grouped pointwise pair with an activation in between: it has no "
                                 "dense twin; keep the shared form")
        weight, offset = affine
        form = module.form
        bias = None
        if module.first.bias is not None:
            bias = offset if module.second_norm is None else torch.zeros_like(offset)  # the norm behind adds it
        replace_module(model, name, form.dense(weight.reshape(form.weight_shape), bias, None))
        if module.second_norm is not None:
            norm = copy.deepcopy(module.second_norm)
            set_affine(norm, torch.ones_like(offset), offset)
            replace_module(model, str(options["norm"]), norm)


def pair_size(form: ConvForm, groups: int, second: bool, bias: bool, norm: nn.Module | None) -> tuple[int, int]:
    """Parameters of the dense layer and of its pair; a norm counts where it moves inside (with L)."""
    inputs, outputs = form.in_channels, form.out_channels
    vectors = outputs * int(bias)
    if second and norm is not None:
        vectors += sum(p.numel() for p in norm.parameters())
    after = inputs * outputs // groups + vectors
    if second:
        after += outputs * outputs // groups + vectors
    return inputs * outputs + vectors, after


def _factors(problem: Problem, options: dict[str, Any]) -> Solution:
    """K, and L where the pair has one."""
    pair = _pair(problem, options)
    tensors = {"first": pair.first[0]}
    if pair.second is not None:
        tensors["second"] = pair.second[0]
    return Solution({}, [tensors], pair.errors)


def _submodule(model: nn.Module, name: Any) -> nn.Module | None:
    return None if name is None else model.get_submodule(str(name))


def _module(layer: nn.Conv2d, plan: GroupPlan, norm: nn.Module | None, act: nn.Module | None) -> GroupedPointwise:
    form = checked_form(plan.members[0], layer)
    options = plan.options
    return GroupedPointwise(
        form, int(options["groups"]), bias=layer.bias is not None, second=bool(options.get("second")),
        shuffle=bool(options.get("shuffle", True)), norm=norm, first_norm=copy.deepcopy(norm), act=act,
        device=layer.weight.device, dtype=layer.weight.dtype,
    )  # fmt: skip


def _order(module: GroupedPointwise) -> Tensor:
    """``order[m]`` is the channel of K that comes out as channel m."""
    channels = module.form.out_channels
    return block_diagonal.interleave_order(channels, module.groups) if module.shuffle else torch.arange(channels)


def _pair(problem: Problem, options: dict[str, Any], free_inputs: bool = False) -> block_diagonal.GroupedSolution:
    groups, second = int(options["groups"]), bool(options.get("second"))
    if not second and not options.get("shuffle", True):
        # The solver's one-factor form ends in the interleave: hand it the rows in the order that this undoes.
        order = block_diagonal.interleave_order(problem.rows, groups).to(problem.weights.device)
        problem = Problem(
            problem.weights[:, order], problem.second, problem.row_metric[:, order], problem.kernel, problem.layer_weights
        )
    rounds, steps = ORDER_EFFORT if free_inputs else FIT_EFFORT
    return block_diagonal.solve(
        problem, groups, second=second, free_inputs=free_inputs, rounds=rounds, cg_steps=steps, tol=1e-3
    )


@torch.no_grad()
def _set(module: GroupedPointwise, tensors: dict[str, Tensor]) -> None:
    module.first.weight.copy_(tensors["first"].reshape(module.first.weight.shape))
    if module.second is not None:
        module.second.weight.copy_(tensors["second"].reshape(module.second.weight.shape))


@torch.no_grad()
def _start_norms(
    module: GroupedPointwise, layer: nn.Conv2d, norm: nn.Module | None, mean: Tensor, covariance: Tensor
) -> None:
    """Norms (or biases) around K and L such that, but for an activation, L P K + K stands in for the dense layer.

    With a the scale of the dense layer's norm: K's norm multiplies by a and takes the mean out, L undoes a on its
    inputs, and L's norm multiplies by a and brings the dense layer's mean back.
    """
    assert module.second is not None
    order = _order(module)
    first, second = (_block_diagonal(conv.weight, module.groups) for conv in (module.first, module.second))
    dense = layer.weight.flatten(1)
    if norm is None or not hasattr(norm, "running_var"):
        if layer.bias is not None and module.first.bias is not None and module.second.bias is not None:
            inner = first @ mean.to(first)
            module.first.bias.copy_(-inner)
            module.second.bias.copy_(layer.bias + dense @ mean.to(dense))
        return
    first_norm, second_norm = cast(Any, module.first_norm), cast(Any, module.second_norm)
    old_scale, old_shift = affine(norm)
    floor = SAFE_SCALE * old_scale.abs().mean().clamp_min(1e-12)
    scale = torch.where(old_scale < 0, -1.0, 1.0) * old_scale.abs().clamp_min(floor)
    mean, covariance = mean.to(first), covariance.to(first)
    through = second @ first[order]
    for part, matrix in ((first_norm, first), (second_norm, through)):
        part.running_var.copy_(((matrix @ covariance) * matrix).sum(1).clamp_min(0))
        part.weight.copy_(scale * (part.running_var + part.eps).sqrt())
    first_norm.running_mean.copy_(first @ mean)
    first_norm.bias.zero_()
    undone = second / scale[order]
    width = module.second.weight.shape[1]
    blocks = undone.reshape(module.groups, -1, module.groups, width).diagonal(dim1=0, dim2=2)
    module.second.weight.copy_(blocks.permute(2, 0, 1).reshape(module.second.weight.shape))
    second_norm.running_mean.zero_()
    bias = 0 if layer.bias is None else layer.bias
    second_norm.bias.copy_(old_shift + old_scale * (dense @ mean + bias))
    for conv in (module.first, module.second):
        if conv.bias is not None:
            conv.bias.zero_()


def _block_diagonal(weight: Tensor, groups: int) -> Tensor:
    return torch.block_diag(*weight.flatten(1).chunk(groups))
