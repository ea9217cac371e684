"""What rounding needs to know of the layers of a network: moments of their inputs, and products with wanted outputs."""

from __future__ import annotations

import torch
from torch import nn

from sharefold.calibration.pairs import Gatherer
from sharefold.calibration.statistics import batch_for
from sharefold.inputs import Input
from sharefold.layers import ConvForm
from sharefold.running import run_on, runs_within
from sharefold.solvers.moments import PairSums

CACHE_BYTES = 1 << 30


@torch.no_grad()
def gather(model: nn.Module, forms: dict[str, ConvForm], centered: dict[str, bool], images: Input) -> dict[str, PairSums]:
    """:class:`PairSums` of the layers ``forms`` of ``model``, whose own outputs are the wanted ones; one pass."""
    gatherers = {name: Gatherer(form, len(images)) for name, form in forms.items()}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: gatherers[name].add(inputs[0], output)
        )
        for name in forms
    ]
    try:
        for batch in images.split(batch_for(images)):
            run_on(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: gatherer.result(centered[name]) for name, gatherer in gatherers.items()}
    return {name: inputs for name, inputs in found.items() if inputs is not None}


def runs(forms: dict[str, ConvForm]) -> list[list[str]]:
    """Names of ``forms`` cut into runs whose moments fit into memory together."""
    names = list(forms)
    needs = [4 * form.groups * form.features**2 for form in forms.values()]
    return [[names[index] for index in run] for run in runs_within(CACHE_BYTES, needs)]
