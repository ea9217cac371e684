"""What a repair sees of one layer: inputs of the converted prefix and outputs of the original, at drawn positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.calibration.statistics import SAMPLES_FLOOR, SAMPLES_PER_FEATURE, patches_of
from sharefold.layers import ConvForm
from sharefold.solvers.data_norm import sample_patches

# Bytes that the samples of one layer may take.
MEMORY_BYTES = 1 << 28
# Times what moments need: pulls are chosen on halves, and what passes a ReLU is a part of it.
MORE = 4


@dataclass(frozen=True)
class Samples:
    """At P positions, drawn alike in inputs and outputs.

    Attributes:
        x: (P, G, N) input patches of the converted network's layer, G conv groups.
        y: (P, O) outputs of the original's layer.
        image: (P,) int64, the image that each position is of.
        given, wanted: (P, O) what the converted and the original network add behind the layer, before a ReLU; or None.
    """

    x: Tensor
    y: Tensor
    image: Tensor
    given: Tensor | None = None
    wanted: Tensor | None = None

    def of(self, images: Tensor) -> Samples:
        """Those of the images whose indices are in ``images``."""
        pick = torch.isin(self.image, images.to(self.image.device))
        return self.at(pick)

    def at(self, pick: Tensor) -> Samples:
        """Those at the positions ``pick`` (bool or indices)."""
        more = [None if part is None else part[pick] for part in (self.given, self.wanted)]
        return Samples(self.x[pick], self.y[pick], self.image[pick], *more)

    def __len__(self) -> int:
        return len(self.y)


class Collector:
    """Draws the samples of one layer batch by batch.

    Args:
        form: of the layer.
        images: how many there will be.
        seed: of the positions.
    """

    def __init__(self, form: ConvForm, images: int, seed: int = 0) -> None:
        self.form, self.seed = form, seed
        wanted = max(MORE * SAMPLES_PER_FEATURE * form.features, MORE * SAMPLES_FLOOR)
        most = MEMORY_BYTES // (4 * (form.groups * form.features + 3 * form.out_channels))
        self.positions = max(1, min(-(-wanted // images), most // images))
        self._parts: list[list[Tensor]] = []
        self._seen = 0

    def add(self, inputs: Tensor, outputs: Tensor, addends: tuple[Tensor, Tensor] | None = None) -> None:
        """One batch; ``addends`` are (given, wanted), of the shape of ``outputs``."""
        count = len(outputs)
        x = patches_of(self.form, inputs, self.positions, self._generator()).float()
        parts = [x, *(self._rows(y) for y in (outputs, *(addends or ())))]
        image = torch.arange(self._seen, self._seen + count, device=x.device).repeat_interleave(len(x) // count)
        self._parts.append([*parts, image])
        self._seen += count

    def samples(self) -> Samples | None:
        """None where nothing came, or something that is not finite."""
        if not self._parts:
            return None
        x, y, *addends, image = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if not all(bool(torch.isfinite(part).all()) for part in (x, y, *addends)):
            return None
        return Samples(x, y, image, *addends)

    def _rows(self, y: Tensor) -> Tensor:
        kernel = None if self.form.kind == "linear" else (1, 1)
        found = sample_patches(y.detach(), kernel, positions=self.positions, generator=self._generator())
        return found.flatten(1).float()

    def _generator(self) -> torch.Generator:
        """The same positions for inputs and outputs of a batch."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self._seen)
        return generator
