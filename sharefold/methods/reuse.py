"""N equal blocks in sequence become one block run N times, with norms of every iteration's own (LruNet)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.repeats import structure
from sharefold.layers import (
    RepeatedBlock,
    absorb_scale,
    mean_output,
    repeat_blocks,
    replace_module,
    shared_parameters,
    shift_output,
    takes_scale,
    weight_matrix,
)  # fmt: skip
from sharefold.methods.alignment import align_groups
from sharefold.methods.contract import ConversionStep, Solution
from sharefold.methods.tied_kernels import TiedFit, fit_members
from sharefold.plans import GroupPlan


class Reuse(ConversionStep):
    """Members are whole blocks of one structure, one right after the other. Options: ``align`` (default true).

    The first member's place holds the repeated block, the other places its further iterations.
    """

    name = "reuse"
    paper = "https://arxiv.org/abs/1901.09615"
    option_names = frozenset({"align"})
    writes_norms = True

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        blocks = [model.get_submodule(name) for name in plan.members]
        for name, block in zip(plan.members, blocks, strict=True):
            if isinstance(block, RepeatedBlock):
                raise SharefoldError(f"plan: group {plan.name!r}: block {name} is repeated already: leave it out")
            if structure(block) != structure(blocks[0]):
                raise SharefoldError(f"plan: group {plan.name!r}: blocks {plan.members[0]} and {name} differ in structure: "
                                     "only equal blocks become one that is repeated")

    def layers(self, graph: NetworkGraph, plan: GroupPlan) -> tuple[str, ...]:
        return tuple(name for names in inner_groups(graph, plan.members) for name in names)

    def align(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> bool:
        groups = inner_groups(graph, plan.members)
        return bool(plan.options.get("align", True)) and align_groups(model, graph, statistics, groups)

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        blocks = [model.get_submodule(name) for name in plan.members]
        tensors = _mean_parameters(blocks)
        own: list[dict[str, Tensor]] = [{} for _ in blocks]
        errors = []
        for names in inner_groups(graph, plan.members):
            leaf = names[0].removeprefix(f"{plan.members[0]}.")
            norms = [_norm_within(block, graph.layers[name].norm) for block, name in zip(plan.members, names, strict=True)]
            form, fit = fit_members(model, graph, statistics, names, True, norms)
            tensors[f"{leaf}.weight"] = form.native(fit.weight).reshape(tensors[f"{leaf}.weight"].shape)
            if fit.bias is not None:
                tensors[f"{leaf}.bias"] = fit.bias
            gain = tensors.get(f"{leaf}.gain")
            kernel = form.standardized(fit.weight.reshape(form.weight_shape), gain).reshape(form.out_channels, -1)
            scales = _scales([model.get_submodule(name) for name in names], gain, fit)
            for index, (name, norm) in enumerate(zip(names, norms, strict=True)):
                if norm is None or fit.bias is not None:
                    continue
                mean = statistics.means[name]
                scale = None if scales is None else scales[index]
                moved = _moved(model.get_submodule(name), model.get_submodule(norm), kernel, scale, mean)
                place = norm.removeprefix(f"{plan.members[index]}.")
                own[index].update({f"{place}.{key}": value for key, value in moved.items()})
            errors.append(fit.errors)
        return Solution(tensors, own, torch.stack(errors).mean(0) if errors else None)

    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        blocks = [model.get_submodule(name) for name in plan.members]
        if solution is not None:
            with torch.no_grad():
                for block, own in zip(blocks, solution.members, strict=True):
                    _copy(block, own)
                _copy(blocks[0], solution.bank)
        for name, part in zip(plan.members, repeat_blocks(blocks), strict=True):
            replace_module(model, name, part)

    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        repeated = cast(RepeatedBlock, model.get_submodule(plan.members[0]))
        for name, block in zip(plan.members, repeated.unrolled(), strict=True):
            replace_module(model, name, block)


def inner_groups(graph: NetworkGraph, blocks: tuple[str, ...]) -> list[list[str]]:
    """For every layer of the first block, that layer in all blocks."""
    leaves = [name.removeprefix(blocks[0]) for name in graph.layers if name.startswith(f"{blocks[0]}.")]
    groups = [[block + leaf for block in blocks] for leaf in leaves]
    return [names for names in groups if all(name in graph.layers for name in names)]


def repeated_size(block: nn.Module, count: int) -> tuple[int, int]:
    """Parameters of ``count`` such blocks apart, and of one block run ``count`` times."""
    total = sum(p.numel() for p in block.parameters())
    shared = sum(dict(block.named_parameters())[name].numel() for name in shared_parameters(block))
    return count * total, shared + count * (total - shared)


def _mean_parameters(blocks: list[nn.Module]) -> dict[str, Tensor]:
    """Shared parameters, averaged; those of layers with statistics are then replaced by better ones."""
    named = [dict(block.named_parameters()) for block in blocks]
    means = {}
    for name in shared_parameters(blocks[0]):
        stack = torch.stack([parameters[name].detach() for parameters in named])
        equal = all(torch.equal(part, stack[0]) for part in stack[1:])
        means[name] = stack[0] if equal else stack.mean(0)
    return means


def _norm_within(block: str, norm: str | None) -> str | None:
    """``norm`` where it lies in ``block``, so that every iteration has one of its own."""
    return norm if norm is not None and norm.startswith(f"{block}.") else None


def _scales(layers: list[nn.Module], gain: Tensor | None, fit: TiedFit) -> Tensor | None:
    """(K, O) of every layer's filters over the common ones, which have the mean ``gain`` of weight-standardised layers."""
    if gain is None:
        return fit.scales
    own = torch.stack([cast(Tensor, layer.gain).detach().reshape(-1) for layer in layers]).to(fit.weight)
    common = gain.reshape(-1).to(own)
    ratios = torch.where(common == 0, torch.ones_like(own), own / common)
    return ratios if fit.scales is None else ratios * fit.scales.to(ratios)


@torch.no_grad()
def _moved(layer: nn.Module, norm: nn.Module, kernel: Tensor, scale: Tensor | None, mean: Tensor) -> dict[str, Tensor]:
    """Tensors of the norm that gives on ``kernel`` (O, N) what ``norm`` does on the layer's own, which is about ``scale`` (O,)
    times as large; ``mean`` (G, N) are the layer's inputs. None of norms without running statistics."""
    copied = _scratch(norm)
    if copied is None:
        return {}
    if not takes_scale(norm):
        scale = None
    dense = weight_matrix(layer)
    change = dense - (kernel if scale is None else kernel * scale.unsqueeze(1)).to(dense)
    shift_output(copied, mean_output(change, mean.to(change)))
    if scale is not None:
        absorb_scale(copied, scale)
    tensors = {key: getattr(copied, key) for key in ("weight", "running_mean", "running_var")}
    return {key: value.detach() for key, value in tensors.items() if value is not None}


def _scratch(norm: nn.Module) -> nn.Module | None:
    """A stand-in with copies of a BatchNorm's tensors; None for norms without running statistics."""
    if getattr(norm, "running_mean", None) is None:
        return None
    mean = cast(Tensor, norm.running_mean)
    copy = nn.BatchNorm2d(len(mean), eps=float(cast(Any, norm.eps)), device=mean.device, dtype=mean.dtype)
    with torch.no_grad():
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = getattr(norm, key)
            if value is None:
                setattr(copy, key, None)
            else:
                getattr(copy, key).copy_(value)
    return copy.requires_grad_(False)


def _copy(block: nn.Module, tensors: dict[str, Tensor]) -> None:
    state = block.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        state[name].data.copy_(tensor)
