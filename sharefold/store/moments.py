"""What rounding needs to know of a layer: moments of its inputs, and their products with the wanted outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharefold.calibrate.statistics import SAMPLES_FLOOR, SAMPLES_PER_FEATURE, patches_of
from sharefold.layers import ConvForm
from sharefold.solvers.data_norm import sample_patches, without_mean

CACHE_BYTES = 1 << 30


@dataclass
class Inputs:
    """Of one layer, of every conv group: ``gram`` (G, N, N), ``mean`` (G, N), and with wanted outputs ``cross``
    (G, O/G, N), ``mean_y`` (G, O/G), ``variance`` (O,). ``gram`` and ``cross`` are centred if ``centered``."""

    gram: Tensor
    mean: Tensor
    cross: Tensor
    mean_y: Tensor
    variance: Tensor


class Gatherer:
    """Adds up :class:`Inputs` batch by batch at sampled positions, the same ones for inputs and outputs."""

    def __init__(self, form: ConvForm, images: int, seed: int = 0) -> None:
        self.form = form
        wanted = max(SAMPLES_PER_FEATURE * form.features, SAMPLES_FLOOR)
        self.positions = max(1, -(-wanted // images))
        self._seed, self._count = seed, 0
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        x = patches_of(self.form, inputs, self.positions, generator).float()  # (P, G, N)
        generator.manual_seed(self._seed)
        kernel = None if self.form.kind == "linear" else (1, 1)
        y = sample_patches(outputs, kernel, positions=self.positions, generator=generator).float()
        self._seed += 1
        groups = self.form.groups
        y = y.reshape(len(y), groups, -1)
        x, y = x.transpose(0, 1), y.transpose(0, 1)
        parts = [x.transpose(1, 2) @ x, y.transpose(1, 2) @ x, x.sum(1), y.sum(1), y.square().sum(1)]
        found = [part.cpu().double() if part.dim() < 3 else part.cpu() for part in parts]
        self._sums = found if not self._sums else [old + new for old, new in zip(self._sums, found, strict=True)]
        self._count += x.shape[1]

    def result(self, centered: bool) -> Inputs | None:
        """None when nothing was added, or something that is not finite."""
        if not self._sums or not all(bool(torch.isfinite(s).all()) for s in self._sums):
            return None
        gram, cross, mean, mean_y, square = (total / self._count for total in self._sums)
        variance = square - mean_y.square() if centered else square
        if centered:
            small, small_y = mean.to(gram), mean_y.to(gram)
            gram = without_mean(gram, small)
            cross = cross - small_y.unsqueeze(2) * small.unsqueeze(1)
        return Inputs(gram, mean, cross, mean_y, variance.clamp_min(0).flatten())


@torch.no_grad()
def gather(
    model: nn.Module, forms: dict[str, ConvForm], centered: dict[str, bool], images: Tensor, batch_size: int = 100
) -> dict[str, Inputs]:
    """:class:`Inputs` of the layers ``forms`` of ``model``, whose own outputs are the wanted ones; one pass."""
    gatherers = {name: Gatherer(form, len(images)) for name, form in forms.items()}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: gatherers[name].add(inputs[0], output)
        )
        for name in forms
    ]
    device = next(model.parameters()).device
    try:
        for batch in images.split(batch_size):
            model(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    found = {name: gatherer.result(centered[name]) for name, gatherer in gatherers.items()}
    return {name: inputs for name, inputs in found.items() if inputs is not None}


def runs(forms: dict[str, ConvForm]) -> list[list[str]]:
    """Names of ``forms`` cut into runs whose moments fit into memory together."""
    result: list[list[str]] = []
    size = 0
    for name, form in forms.items():
        need = 4 * form.groups * form.features**2
        if not result or size + need > CACHE_BYTES:
            result.append([])
            size = 0
        result[-1].append(name)
        size += need
    return result
