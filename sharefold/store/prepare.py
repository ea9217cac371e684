"""Before anything is rounded: what to round, how finely each row should be, and bases turned so that it costs least."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.sensitivity import output_sensitivity
from sharefold.calibration.statistics import WIDE, batch_for
from sharefold.format import carried_config
from sharefold.graph import NetworkGraph
from sharefold.inputs import Input
from sharefold.layers import STOCK_LAYERS, Bank, ConvForm, SharedConv, affine, any_form_of, banks, free_moments
from sharefold.outputs import Divergence, divergence_of
from sharefold.plans import Plan
from sharefold.solvers.moments import PairSums
from sharefold.solvers.tucker_als import lift
from sharefold.store.gathering import gather, runs
from sharefold.store.rounding import unabsorbed

# Tensors smaller than this are kept as halves.
SMALLEST = 64
# A row that hardly matters now may matter on other images: its weight is at least this share of the mean.
ROW_FLOOR = 2.5e-3


@dataclass
class Prepared:
    """Per tensor name: ``rows`` (O,), importance of a squared output error of each row times what no later column
    absorbs, so that a step of ``c / sqrt(rows)`` spends bits where they count; and ``metrics`` (1, N, N) of bases."""

    graph: NetworkGraph  # of the dense network
    forms: dict[str, ConvForm]
    centered: dict[str, bool]
    rows: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The tensors that are rounded to few bits: weights of convolutions and Linears, banks, coefficients, factors."""
    found: dict[str, nn.Parameter] = {}
    plan, candidates = plan_of(model), list(_candidates(model))
    # A tied tensor that is protected under one of its names stays under all of them.
    seen = {id(parameter) for name, _, parameter in candidates if plan.protects(name)}
    for name, leaf, parameter in candidates:
        large = parameter.dim() >= 2 and parameter.numel() >= SMALLEST and parameter.is_floating_point()
        if large and leaf != "gain" and id(parameter) not in seen:
            seen.add(id(parameter))
            found[f"{name}.{leaf}" if name else leaf] = parameter
    return found


def tensor_names(name: str, layer: nn.Module) -> tuple[str, str]:
    """Names of the tensor whose rows are the outputs of the layer ``name``, and of the layer's own bias; it may have neither."""
    leaves = (layer.coefficients_name, "own_bias") if isinstance(layer, SharedConv) else ("weight", "bias")
    return f"{name}.{leaves[0]}", f"{name}.{leaves[1]}"


def plan_of(model: nn.Module) -> Plan:
    """What the model was converted by; nothing for a dense one."""
    config = carried_config(model)
    return Plan([], 0, 0) if config is None else config.plan


def _candidates(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    shelves = {id(bank) for bank in banks(model).values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (*STOCK_LAYERS, SharedConv)) or id(module) in shelves:
            for leaf, parameter in module.named_parameters(recurse=False):
                yield name, leaf, parameter


@torch.no_grad()
def prepare(
    original: nn.Module, model: nn.Module, graph: NetworkGraph, images: Input, divergence: Divergence | None = None
) -> Prepared:
    """Measures ``model`` (float still) and turns the bases of its banks; the network computes what it did.

    Args:
        original: a dense network of the graph, for the layers' norms.
        images: (n, C, H, W) calibration images.
        divergence: of conversions from ``original``; by default told from the images.
    """
    forms, centered = {}, {}
    for name, record in graph.layers.items():
        try:
            layer = model.get_submodule(name)
        except AttributeError:  # a block that another one stands in for
            continue
        form = any_form_of(layer)
        if form is not None and form.standardize is None and form.features <= WIDE:
            forms[name] = form
            centered[name] = output_mean_owner(model, layer, record.norm) is not None
    plan = Prepared(graph, forms, centered)
    divergence = divergence_of(original, images, graph, batch_for(images)) if divergence is None else divergence
    sensitivity = output_sensitivity(original, list(forms), images, batch_for(images), divergence=divergence)
    members = _members(model, forms)
    together = [name for names in members.values() for name in names]
    _shared(model, graph, plan, members, sensitivity, images)
    for run in runs({name: form for name, form in forms.items() if name not in together}):
        for name, inputs in gather(model, {n: forms[n] for n in run}, centered, images).items():
            _measure(model, graph, plan, name, inputs, sensitivity.get(name))
    for name, tensor in matrices(model).items():
        if name not in plan.rows:  # no inputs known: relative error of the tensor itself
            plan.rows[name] = torch.full((tensor.shape[0],), 1 / max(float(tensor.double().square().sum()), 1e-30))
    return plan


def _members(model: nn.Module, forms: dict[str, ConvForm]) -> dict[str, list[str]]:
    """Layers by bank, under the bank's name in the model."""
    names = {id(bank): f"sharefold_banks.{key}" for key, bank in banks(model).items()}
    result: dict[str, list[str]] = {}
    for name in forms:
        bank = model.get_submodule(name).__dict__.get("bank")
        if bank is not None:
            result.setdefault(names[id(bank)], []).append(name)
    return result


def _row_importance(
    model: nn.Module, norm: str | None, inputs: PairSums, sensitivity: Tensor | None
) -> Tensor:
    """(O,) what a squared error of one output channel matters: scaled by the norm behind it, relative to the layer's
    output, times the square root of what losing the layer would cost the predictions."""
    scale = torch.ones_like(inputs.variance)
    found = None if norm is None else model.get_submodule(norm)
    variance = getattr(found, "running_var", None)
    if variance is not None and variance.shape == scale.shape:
        scale = affine(found)[0].detach().cpu().double().square()
    scale = scale.clamp_min(ROW_FLOOR * float(scale.mean()))
    rows = scale / (scale * inputs.variance).sum().clamp_min(1e-30)
    if sensitivity is not None and sensitivity.shape == scale.shape:
        loss = 0.5 * float((sensitivity.double().cpu() * inputs.variance).sum())
        rows = rows * max(loss, 1e-6) ** 0.5
    return rows


def _measure(
    model: nn.Module, graph: NetworkGraph, plan: Prepared, name: str, inputs: PairSums, sensitivity: Tensor | None
) -> None:
    layer = model.get_submodule(name)
    rows = _row_importance(model, graph.layers[name].norm, inputs, sensitivity)
    plan.importance[name] = rows
    per_group = rows.reshape(len(inputs.gram), -1)
    if not isinstance(layer, SharedConv):
        if plan.forms[name].transposed:  # whose rows are inputs
            return
        plan.rows[f"{name}.weight"] = (per_group * unabsorbed(inputs.gram).unsqueeze(1)).flatten()
        return
    part = layer.linear_part()
    if part is None:
        return
    filters, coefficients = (t.detach().cpu().double() for t in part)
    flat = filters.flatten(1)
    gram = flat @ inputs.gram.double() @ flat.T
    plan.rows[f"{name}.{layer.coefficients_name}"] = (per_group * unabsorbed(gram).unsqueeze(1)).flatten()
    if layer.pivoted_name is not None:
        power = (coefficients.square() * rows.unsqueeze(1)).sum(0)  # (M,)
        metric = layer.own_moments(inputs.gram.double().mean(0, keepdim=True))
        plan.rows[f"{name}.{layer.pivoted_name}"] = layer.own_power(power) * unabsorbed(metric)


def _shared(
    model: nn.Module, graph: NetworkGraph, plan: Prepared, members: dict[str, list[str]],
    sensitivity: dict[str, Tensor], images: Input,
) -> None:  # fmt: skip
    for bank_name, names in members.items():
        found = gather(model, {name: plan.forms[name] for name in names}, plan.centered, images)
        rows = {
            name: _row_importance(model, graph.layers[name].norm, inputs, sensitivity.get(name))
            for name, inputs in found.items()
        }
        bank = model.get_submodule(bank_name)
        if found and hasattr(bank, "basis"):
            _basis_metric(model, plan, bank_name, found, rows)
        elif found and hasattr(bank, "weight"):
            _kernel_metric(model, plan, bank_name, found, rows)
        for name, inputs in found.items():
            _measure(model, graph, plan, name, inputs, sensitivity.get(name))


def _kernel_metric(
    model: nn.Module, plan: Prepared, bank_name: str, found: dict[str, PairSums], rows: dict[str, Tensor]
) -> None:
    weights = {name: _layer(model, name).bank_power(value) for name, value in rows.items()}
    total = sum(found[name].gram.double() * float(weights[name].sum()) for name in found)
    metric = total / sum(float(w.sum()) for w in weights.values())
    assert isinstance(metric, Tensor)
    key = f"{bank_name}.weight"
    plan.metrics[key] = metric
    summed = torch.stack(list(weights.values())).sum(0).reshape(len(metric), -1)
    plan.rows[key] = (summed * unabsorbed(metric).unsqueeze(1)).flatten()


def _basis_metric(
    model: nn.Module, plan: Prepared, bank_name: str, found: dict[str, PairSums], rows: dict[str, Tensor]
) -> None:
    layers = {name: _layer(model, name) for name in found}
    bank = cast(Bank, model.get_submodule(bank_name))
    basis: nn.Parameter = bank.basis  # type: ignore[assignment]
    pivots = bank.pivots
    weights = {name: float((rows[name] * found[name].variance).sum()) for name in layers}
    # Layers that are narrower than the bank use its first channels.
    size = basis[0].numel() + (0 if pivots is None else len(pivots))
    grams = {name: _widened(found[name].gram.double().mean(0), size) for name in layers}
    metric = sum(grams[name] * weights[name] for name in layers) / sum(weights.values())
    assert isinstance(metric, Tensor)
    whole, projection = metric, getattr(bank, "projection", None)
    if projection is not None:
        lifted = lift(torch.eye(basis[0].numel(), dtype=torch.float64), projection.detach().cpu().double())
        metric = lifted @ whole @ lifted.T
    # Every turn needs all coefficients that multiply the basis. A basis with pivots has no turn left.
    if pivots is None and all(layer.turnable for layer in layers.values()) and len(layers) == bank.uses:
        _turn(basis, layers, metric, rows)
    metric = free_moments(metric.unsqueeze(0), pivots)
    power = _total(layer.bank_power(rows[name]) for name, layer in layers.items()).diagonal()
    key = f"{bank_name}.basis"
    plan.metrics[key] = metric
    plan.rows[key] = power * unabsorbed(metric)
    if projection is not None:
        taps = basis[0, 0].numel()
        marginal = whole.reshape(-1, taps, len(whole) // taps, taps).diagonal(dim1=1, dim2=3).mean(-1)
        carried = torch.einsum("r,rjt->j", power, basis.detach().cpu().double().flatten(2).square())
        key = f"{bank_name}.projection"
        plan.metrics[key] = marginal.unsqueeze(0)
        plan.rows[key] = carried * unabsorbed(marginal.unsqueeze(0))


def _layer(model: nn.Module, name: str) -> SharedConv:
    return cast(SharedConv, model.get_submodule(name))


def _total(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _widened(gram: Tensor, size: int) -> Tensor:
    """(size, size): moments of inputs that are followed by ones that are always 0; wider moments stay as they are."""
    return nn.functional.pad(gram, (0, max(size - len(gram), 0)) * 2)


def _turn(basis: nn.Parameter, layers: dict[str, SharedConv], metric: Tensor, rows: dict[str, Tensor]) -> None:
    """Exchanges the basis for an equivalent one with uncorrelated responses of equal power, sorted by what they carry.

    Then equal steps are right for all coefficients, and those of late filters are small and cost few bits.
    """
    flat = basis.detach().cpu().double().flatten(1)
    values, vectors = torch.linalg.eigh(flat @ metric @ flat.T)
    values = values.clamp_min(1e-9 * float(values.max()) + 1e-30)
    root = vectors * values.sqrt()  # G = root root^T
    _, axes = torch.linalg.eigh(root.T @ _total(layer.bank_power(rows[name]) for name, layer in layers.items()) @ root)
    axes = axes.flip(1)
    turned = axes.T @ (vectors / values.sqrt()).T @ flat
    basis.copy_(turned.reshape(basis.shape).to(basis))
    for layer in layers.values():
        layer.mix_shared(root @ axes)
