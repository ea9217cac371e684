"""One output of a network: where it stands, what its numbers mean, and how it is taken from what the network returns."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from sharefold.errors import SharefoldError

LOGITS = "logits"
PROBABILITIES = "probabilities"
BINARY = "binary"
MULTILABEL = "multi-label"
REGRESSION = "regression"
IMAGE = "image"
EMBEDDING = "embedding"
BOXES = "boxes"
SCORES = "scores"
LABELS = "labels"
GIVEN = "given"  # why a kind is what it is, where the user says so
# What a user may say; "labels" are told from the type alone.
KINDS = (LOGITS, PROBABILITIES, BINARY, MULTILABEL, REGRESSION, IMAGE, EMBEDDING, BOXES, SCORES)
CLASSES = (LOGITS, PROBABILITIES)
# What the numbers of an image are, as users say it: from 0 to 1, from 0 to 255, from -1 to 1, or normalised as the images that
# go in.
SHARES, BYTES, TANH, NORMALISED = "1", "255", "tanh", "normalised"
SCALES = (SHARES, BYTES, TANH, NORMALISED)
YES_NO = (BINARY, MULTILABEL, SCORES)


@dataclass(frozen=True)
class Leaf:
    """One output, or a range of channels of a tensor that holds several.

    Attributes:
        name: the way to it in what the network returns, and its channels where it is a part: ``"output[0:4]"``.
        kind: what its numbers are, one of :data:`KINDS` or ``"labels"``.
        axis: of classes or channels, images being axis 0; None where there is none.
        channels: (first, end) along ``axis``, where it is a part.
        activated: sigmoid or softmax is done already.
        weight: in the sum over outputs.
        why: how the kind was told.
        scale: of an image, one of :data:`SCALES`; "" where the user says nothing.
        source: name of the tensor that it is (a part of).
        images_axis: where the tensor as returned counts images.
        per_image: entries of that axis an image; more than one where a network flattens steps into it.
    """

    name: str
    kind: str
    axis: int | None = None
    channels: tuple[int, int] | None = None
    activated: bool = False
    weight: float = 1.0
    why: str = ""
    scale: str = ""
    source: str = ""
    images_axis: int = 0
    per_image: int = 1

    def take(self, tensor: Tensor, images: int) -> Tensor:
        """``tensor`` as returned, as (images, ...) with this leaf's channels alone; a view.

        Raises:
            SharefoldError: the tensor has another size.
        """
        tensor = images_first(tensor, self.images_axis, self.per_image)
        if len(tensor) != images or (self.channels is not None and tensor.shape[self.axis or 0] < self.channels[1]):
            raise SharefoldError(f"output {self.name}: {tuple(tensor.shape)} of {images} images is not what it was read as")
        if self.channels is not None:
            assert self.axis is not None
            tensor = tensor.narrow(self.axis, self.channels[0], self.channels[1] - self.channels[0])
        return tensor

    def text(self) -> str:
        """For people: ``logits over axis 1``."""
        where = f" over axis {self.axis}" if self.kind in CLASSES else ""
        return f"{self.kind}{where}{', already between 0 and 1' if self.activated and self.kind in YES_NO else ''}"

    def to_dict(self) -> dict[str, Any]:
        """What ``inspect --json`` shows."""
        return asdict(self)


def images_first(tensor: Tensor, images_axis: int, per_image: int) -> Tensor:
    """(images, ...): images to the front, and what is flattened into them behind them; a view."""
    if images_axis:
        tensor = tensor.movedim(images_axis, 0)
    if per_image > 1:
        tensor = tensor.unflatten(0, (len(tensor) // per_image, per_image))
    return tensor


def rows(tensor: Tensor, axis: int) -> Tensor:
    """(images, positions, classes) float32 of (images, ...) with the classes on ``axis``."""
    return tensor.float().movedim(axis, -1).reshape(len(tensor), -1, tensor.shape[axis])
