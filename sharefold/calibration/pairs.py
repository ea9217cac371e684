"""A layer's inputs and wanted outputs as pairs, from positions drawn alike in both."""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.calibration.statistics import outputs_of, patches_of, samples_for
from sharefold.layers import ConvForm
from sharefold.solvers.moments import Moments, PairSums


def by_group(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (P, G, N) and outputs (P, O) of a layer as :class:`Moments` takes them: (G, N, P) and (G, O/G, P)."""
    return x.permute(1, 2, 0), y.reshape(len(y), x.shape[1], -1).permute(1, 2, 0)


class Gatherer:
    """Adds up :class:`PairSums` batch by batch at sampled positions, the same ones for inputs and outputs.

    Args:
        form: of the layer.
        images: how many there will be, for the number of positions.
        seed: of the drawn positions.
        positions: drawn an image; by default as many as the layer's features ask for.
    """

    def __init__(self, form: ConvForm, images: int, seed: int = 0, positions: int | None = None) -> None:
        self.form = form
        self.positions = max(1, -(-samples_for(form) // images)) if positions is None else positions
        self._seed = seed
        self._sums = Moments(torch.float32, "cpu")

    @torch.no_grad()
    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """One batch: the layer's inputs, (B, I, D, H, W), (B, I, H, W), (B, I, L) or (B, ..., I), and wanted outputs."""
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        x = patches_of(self.form, inputs, self.positions, generator).float()  # (P, G, N)
        generator.manual_seed(self._seed)
        y = outputs_of(self.form, outputs, self.positions, generator).float()
        self._seed += 1
        self._sums.add(*by_group(x, y))

    def result(self, centered: bool) -> PairSums | None:
        """None when nothing was added, or something that is not finite."""
        return self._sums.pairs(centered)
