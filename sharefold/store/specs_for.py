"""How finely every tensor of a network is rounded, of what a user asks for and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sharefold.format import aliases_of
from sharefold.solvers.grid import kmeans_codebook, search_scale
from sharefold.state_dicts import tensor_state
from sharefold.store.norm_absorption import Gain
from sharefold.store.prepare import ROW_FLOOR, Prepared, matrices, plan_of, tensor_names
from sharefold.store.rans import LARGEST
from sharefold.store.tensor_spec import StoreRequest, StoreSpec, TensorSpec, scaled
from sharefold.tensor_values import write

# No row is coded more finely than its largest number can be, with room for what rounding passes on to it.
ROOM = 0.9
# What offsets add to the error of a layer that rounding its weights makes; shorter ones stay halves.
OFFSET_SHARE = 0.02
SHORTEST = 16


def snap_(model: nn.Module, spec: StoreSpec) -> None:
    """Rounds every tensor of ``model`` to the nearest value that ``spec`` can hold."""
    with torch.no_grad():
        for name, tensor in tensor_state(model).items():
            if name in spec.tensors:
                write(tensor, spec.tensors[name].snapped(tensor))


def halves(model: nn.Module) -> StoreSpec:
    """Every floating tensor as halves, once, unless it has values beyond their range or is protected under any of its names."""
    plan, state = plan_of(model), tensor_state(model)
    aliases = aliases_of(state)
    kept = {aliases.get(name, name) for name in state if plan.protects(name.rpartition(".")[0])}
    return StoreSpec({
        name: TensorSpec("fp16") for name, tensor in state.items()
        if name not in aliases and name not in kept and tensor.is_floating_point() and bool((tensor.abs() < 65504).all())
    })  # fmt: skip


def matrix_spec(matrix: Tensor, rows: Tensor, request: StoreRequest, metric: Tensor | None) -> TensorSpec:
    """Row scales, and levels, for one matrix.

    Args:
        matrix: (O, N).
        rows: (O,), of :class:`Prepared`.
        metric: (G, N, N) moments of its inputs, where they are known.
    """
    matrix = matrix.detach().cpu().double()
    if request.kind == "coded":
        steps = request.step / rows.clamp_min(1e-30).sqrt()
        return scaled("coded", torch.maximum(steps, matrix.abs().amax(1) / (ROOM * LARGEST)))
    importance = None if metric is None else metric.double().diagonal(dim1=1, dim2=2).mean(0)
    if importance is not None and not bool(importance.any()):
        importance = None
    if request.kind == "grid":
        return scaled("grid", search_scale(matrix, request.bits, importance), request.bits)
    scale = matrix.square().mean(1).sqrt()
    entry = scaled("codebook", torch.where(scale > 0, scale, torch.ones_like(scale)), request.bits)
    ratio = matrix / entry.row_scales().double()
    mass = entry.row_scales().double().square().expand_as(ratio)
    _, levels = kmeans_codebook(ratio, request.bits, mass if importance is None else mass * importance)
    entry.levels = levels.half().float().unique().tolist()
    return entry


def offset_specs(
    model: nn.Module, prepared: Prepared, gains: Mapping[str, Gain], request: StoreRequest
) -> dict[str, TensorSpec]:  # fmt: skip
    """For coded networks the steps of norms' offsets and of layers' own biases; powers of two, so that halves hold the values.

    Rounding a layer's matrix to N columns at step c adds N c^2 / 12 to the error of an output of importance 1
    (:class:`Prepared`); offsets may add ``OFFSET_SHARE`` of that.
    """
    if request.kind != "coded":
        return {}
    state, behind = tensor_state(model), {gain.layer: gain for gain in gains.values()}
    found = {}
    for name, importance in prepared.importance.items():
        key, vector = tensor_names(name, model.get_submodule(name))
        gain, power = behind.get(name), importance
        if gain is not None:  # then the layer has no bias
            vector, scale = f"{gain.norm}.bias", gain.scale.square()
            power = importance / scale.clamp_min(max(ROW_FLOOR * float(scale.mean()), 1e-30))
        matrix, offsets, mean = state.get(key), state.get(vector), float(power.mean())
        if matrix is None or offsets is None or offsets.numel() < SHORTEST or not 0 < mean < math.inf:
            continue
        step = request.step * math.sqrt(OFFSET_SHARE * matrix[0].numel() / mean)
        least = float(offsets.abs().max()) / (ROOM * LARGEST)
        if 0 < step < math.inf and math.isfinite(least):
            found[vector] = TensorSpec("coded", 0, 2.0 ** _octave(step, least), [0])
    return found


def _octave(step: float, least: float) -> int:
    """The power of two below ``step`` that is not below ``least``."""
    return max(math.floor(math.log2(step)), math.ceil(math.log2(least)) if least > 0 else -100, -100)


def halves_and_offsets(
    model: nn.Module, prepared: Prepared, gains: Mapping[str, Gain], request: StoreRequest
) -> StoreSpec:  # fmt: skip
    """How everything beside the matrices is stored; what is protected is not in it."""
    spec = halves(model)
    offsets = offset_specs(model, prepared, gains, request)
    spec.tensors.update({name: entry for name, entry in offsets.items() if name in spec.tensors})
    return spec


def nearest(model: nn.Module, prepared: Prepared, gains: Mapping[str, Gain], step: float) -> StoreSpec:
    """Coded matrices and offsets at ``step``, everything else as halves."""
    request = StoreRequest("coded", step=step)
    spec = halves_and_offsets(model, prepared, gains, request)
    for name, tensor in matrices(model).items():
        spec.tensors[name] = matrix_spec(tensor.flatten(1), prepared.rows[name], request, None)
    return spec
