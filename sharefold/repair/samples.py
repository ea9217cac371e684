"""What a repair sees of one layer: inputs of the converted prefix and outputs of the original, at drawn positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.calibration.statistics import outputs_of, patches_of, samples_for
from sharefold.layers import ConvForm

# Bytes that the samples of one layer may take.
MEMORY_BYTES = 1 << 28
# Times the positions that moments need: pulls are chosen on halves, and what passes a ReLU is a part of it. Four times as many
# positions as moments need made no network better.
MORE = 2


@dataclass(frozen=True)
class Samples:
    """At P positions, drawn alike in inputs and outputs.

    Attributes:
        x: (P, G, N) input patches of the converted network's layer, G conv groups.
        y: (P, O) outputs of the original's layer.
        image: (P,) int64, the image that each position is of.
        given, wanted: (P, O) what the converted and the original network add behind the layer, a ReLU behind or not; or None.
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
        most = MEMORY_BYTES // (4 * (form.groups * form.features + 3 * form.out_channels))
        self.positions = max(1, min(-(-MORE * samples_for(form) // images), most // images))
        self._parts: list[list[Tensor]] = []
        self._seen = 0

    def add(
        self, inputs: Tensor, outputs: Tensor, addends: tuple[Tensor, Tensor] | None = None, images: int | None = None,
        again: bool = False,
    ) -> None:  # fmt: skip
        """One batch.

        Args:
            addends: (given, wanted), of the shape of ``outputs``.
            images: how many they are of, where the first axis holds several parts of each, one after another (windows, tokens,
                frames).
            again: they are the images of the last batch, in another run of the layer.
        """
        images = len(outputs) if images is None else images
        self._seen -= images if again else 0
        inputs, *rows = (self._by_image(part, images) for part in (inputs, outputs, *(addends or ())))
        count = len(inputs)
        positions = max(1, self.positions * images // count)
        parts = [patches_of(self.form, inputs, positions, self._generator()).float()]
        parts += [self._rows(part, positions) for part in rows]
        image = self._seen + torch.arange(count, device=inputs.device) * images // count
        self._parts.append([*parts, image.repeat_interleave(len(parts[0]) // count)])
        self._seen += images

    def samples(self) -> Samples | None:
        """None where nothing came, or something that is not finite."""
        if not self._parts:
            return None
        x, y, *addends, image = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        if not all(bool(torch.isfinite(part).all()) for part in (x, y, *addends)):
            return None
        return Samples(x, y, image, *addends)

    def _by_image(self, values: Tensor, images: int) -> Tensor:
        """A Linear's rows by the image that they are of, (images, rows, C), where that can be told."""
        if self.form.kind != "linear" or len(values) == images:
            return values
        if values.ndim == 3 and values.shape[1] == images:  # tokens come first
            return values.transpose(0, 1)
        return values if len(values) % images else values.reshape(images, -1, values.shape[-1])

    def _rows(self, y: Tensor, positions: int) -> Tensor:
        return outputs_of(self.form, y, positions, self._generator()).float()

    def _generator(self) -> torch.Generator:
        """The same positions for inputs and outputs of a batch."""
        generator = torch.Generator()
        generator.manual_seed(self.seed + self._seen)
        return generator
