"""The scale of a rounded network's logits: its last layer times a number, without rounding it again.

Rounding is damage like any other, after which a network is surer, or less sure, of the same answers than it was
(:mod:`sharefold.repair.confidence`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sharefold.repair.confidence import Confidence
from sharefold.repair.work import Work
from sharefold.state_dicts import tensor_state
from sharefold.store.prepare import tensor_names
from sharefold.store.quantize import StoreReport
from sharefold.store.size import file_bytes
from sharefold.store.tensor_spec import StoreSpec, carry_spec, rows_of

# Images that decide, at least: the best scale for a few certain answers is a matter of chance.
FEWEST = 30
# Rounding changes the scale by less than this, either way.
WIDEST = 2.0


def settle_rounded(work: Work, report: StoreReport, widest: float = WIDEST) -> dict[str, float]:
    """Gives the logits of ``work.model``, which was rounded, the scale of least divergence.

    Left as it is where few images decide, where a factor is beyond what rounding does, where the divergence does not clearly fall
    and where the file would grow beyond its budget.

    Args:
        widest: factors further from 1 than this are not plausible.

    Returns:
        The factors by the name of the output; none where nothing was scaled.
    """
    model, guard = work.model, work.guard
    if len(work.cal.parts.decide) < FEWEST:
        return {}
    confidence, now = Confidence(work), guard.current(model)
    factors = confidence.settle()
    confidence.undo()
    names = {id(module): name for name, module in model.named_modules()}
    before = [(p, p.detach().clone()) for layer in confidence.layers.values() for p in layer.parameters(recurse=False)]
    spec = report.spec
    for output, factor in factors.items():
        spec = rescale_(model, spec, names[id(confidence.layers[output])], factor)
    plausible = bool(factors) and all(1 / widest < factor < widest for factor in factors.values())
    after = guard.divergence(model) if plausible else now
    kept = guard.better(after, now)
    size, budget = file_bytes(model, spec) if kept else report.bytes, report.request.budget
    if not kept or (budget is not None and size > budget):
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        return {}
    guard.settle(after)
    report.spec, report.bytes = spec, size
    carry_spec(model, spec)
    return {output: round(factor, 4) for output, factor in factors.items()}


@torch.no_grad()
def rescale_(model: nn.Module, spec: StoreSpec, name: str, factor: float) -> StoreSpec:
    """Multiplies the output of layer ``name`` of ``model`` in place.

    The codes of matrices stay, and their row scales are multiplied; halves and offsets are rounded anew, each to its own grid.

    Returns:
        ``spec`` with what has changed.
    """
    state, changed = tensor_state(model), {}
    for key in tensor_names(name, model.get_submodule(name)):
        tensor, entry = state.get(key), spec.tensors.get(key)
        if tensor is None:
            continue
        if entry is None or entry.kind == "fp16" or tensor.dim() < 2:
            scaled = tensor * factor
            tensor.copy_(scaled if entry is None else entry.snapped(scaled))
            continue
        codes = entry.codes(tensor.reshape(rows_of(tensor), -1))
        changed[key] = now = replace(entry, top=float(torch.tensor(entry.top * factor, dtype=torch.float32)))
        tensor.copy_(now.values(codes).reshape(tensor.shape).to(tensor))
    return StoreSpec({**spec.tensors, **changed})
