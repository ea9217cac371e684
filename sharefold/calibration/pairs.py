"""What a layer's inputs and wanted outputs say together: their moments, from positions drawn alike in both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.calibration.statistics import SAMPLES_FLOOR, SAMPLES_PER_FEATURE, patches_of
from sharefold.layers import ConvForm
from sharefold.solvers.data_norm import sample_patches, without_mean


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
    """Adds up :class:`Inputs` batch by batch at sampled positions, the same ones for inputs and outputs.

    Args:
        form: of the layer.
        images: how many there will be, for the number of positions.
        seed: of the drawn positions.
        positions: drawn an image; by default as many as the layer's features ask for.
    """

    def __init__(self, form: ConvForm, images: int, seed: int = 0, positions: int | None = None) -> None:
        self.form = form
        wanted = max(SAMPLES_PER_FEATURE * form.features, SAMPLES_FLOOR)
        self.positions = max(1, -(-wanted // images)) if positions is None else positions
        self._seed, self._count = seed, 0
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """One batch: the layer's inputs, (B, I, H, W) or (B, ..., I), and its wanted outputs on them."""
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
