"""From what a network says of a batch to the size and the scale of the truth: masks, images and boxes of the whole pictures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.data.coco import Objects
from sharefold.data.preprocess import Preprocess
from sharefold.data.truth import Answer
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.outputs import leaf as kinds
from sharefold.outputs.leaf import Leaf
from sharefold.tasks.detections import Found, RawBoxes, as_found
from sharefold.tasks.image_scale import ImageScale
from sharefold.tasks.truth_scores import BoxScores, ImageScores, MaskScores, Part, TruthFigure

_MOST_CLASSES = 256  # of networks that return class numbers themselves, which do not say how many there are


class Measure(Protocol):
    """Counts batch by batch."""

    def add(self, said: Any, answers: Sequence[Answer]) -> None:
        """What the network says of a batch, and what is true of it."""

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        """Over all batches."""


class MaskMeasure:
    """One class a pixel, at the size of the mask.

    Args:
        leaf: the output that is measured.
        answer: (n, ...) of it, for a few images.
    """

    def __init__(self, leaf: Leaf, answer: Tensor) -> None:
        self.leaf = leaf
        classes = 2 if leaf.kind == kinds.BINARY else _MOST_CLASSES if leaf.kind == kinds.LABELS else answer.shape[leaf.axis or 1]
        self._scores = MaskScores(classes, counted=leaf.kind != kinds.LABELS)

    def add(self, said: Sequence[Tensor], answers: Sequence[Answer]) -> None:
        (maps,) = said
        classes = self.leaf.kind in kinds.CLASSES
        maps = maps.movedim(self.leaf.axis or 1, 1) if classes else maps.reshape(len(maps), 1, *maps.shape[-2:])
        for one, answer in zip(maps, answers, strict=True):
            assert isinstance(answer.value, Tensor)
            self._scores.add(self._decided(one[None], answer.value.shape).cpu(), answer.value, answer.name)

    def _decided(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Classes (h, w) of maps (1, C, h', w'): values are enlarged first, then decided by."""
        if self.leaf.kind == kinds.LABELS:
            found = F.interpolate(maps.float(), size, mode="nearest-exact")[0, 0].long()
            if not 0 <= int(found.min()) <= int(found.max()) < _MOST_CLASSES:
                raise SharefoldError(f"output {self.leaf.name}: it holds whole numbers that are no classes from 0 to 255")
            return found
        maps = F.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
        if self.leaf.kind == kinds.BINARY:
            return (maps[0, 0] > (0.5 if self.leaf.activated else 0.0)).long()
        return maps[0].argmax(0)

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        return self._scores.figures(seed)


class ImageMeasure:
    """Images at the size that the network makes them, from 0 to 1.

    Args:
        preprocess: of the pictures.
        scale: on which the network makes them.
    """

    def __init__(self, preprocess: Preprocess, scale: ImageScale) -> None:
        self.preprocess, self.scale, self._scores, self.resized = preprocess, scale, ImageScores(), 0

    def add(self, said: Sequence[Tensor], answers: Sequence[Answer]) -> None:
        made = said[0].float().cpu()
        targets = torch.stack([self._fitting(answer, (made.shape[2], made.shape[3])) for answer in answers])
        for one, target in zip(self.scale(made), targets, strict=True):
            self._scores.add(one, target)

    def _fitting(self, answer: Answer, made: tuple[int, int]) -> Tensor:
        """The target as large as what the network makes of the picture; with a picture that was resized, it is resized."""
        target, given = answer.value, self.preprocess.size[1:]
        assert isinstance(target, Tensor)
        size = (target.shape[1], target.shape[2])
        if size == made:
            return target
        if any(goal * small != out * own for goal, small, out, own in zip(size, given, made, answer.size, strict=True)):
            raise SharefoldError(
                f"{answer.name}: its target is {size[1]}x{size[0]} of {answer.size[1]}x{answer.size[0]} pixels, the network "
                f"makes {made[1]}x{made[0]} of {given[1]}x{given[0]}: both must enlarge alike"
            )
        self.resized += 1
        return F.interpolate(target[None], made, mode="bicubic", antialias=True)[0].clamp(0, 1)

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        if self.resized:
            channels, height, width = self.preprocess.size
            warnings.warn(
                f"{self.resized} pictures were resized to {width}x{height}, and their targets with them: the figures are of "
                f"resized pixels; --input-size {channels},H,W measures pictures of one size as they are",
                SharefoldWarning,
                stacklevel=2,
            )
        return self._scores.figures(seed)


class BoxMeasure:
    """Objects in the pictures' own pixels.

    Args:
        leaves: the outputs that are boxes and scores; none where the network returns detections.
        categories: id -> name.
        size: (height, width) of the network's input.
    """

    def __init__(self, leaves: Sequence[Leaf], categories: Mapping[int, str], size: tuple[int, int]) -> None:
        self.leaves, self.categories, self.size = leaves, categories, size
        self._scores = BoxScores(categories)
        self._raw: RawBoxes | None = None

    def add(self, said: Any, answers: Sequence[Answer]) -> None:
        scales = [(answer.size[1] / self.size[1], answer.size[0] / self.size[0]) for answer in answers]
        if self.leaves:
            found = self._found(said, scales)
        else:
            found = [as_found(one, scale) for one, scale in zip(said, scales, strict=True)]
        for one, answer in zip(found, answers, strict=True):
            assert isinstance(answer.value, Objects)
            self._scores.add(one, answer.value)

    def _found(self, said: Sequence[Tensor], scales: Sequence[tuple[float, float]]) -> list[Found]:
        (boxes, scores), last = (tensor.float().cpu() for tensor in said), self.leaves[1]
        boxes, scores = boxes.movedim(self.leaves[0].axis or 1, -1), scores.movedim(last.axis or 1, -1)
        scores = scores if last.activated else scores.sigmoid()
        if self._raw is None:
            self._raw = RawBoxes.told(boxes, scores, self.categories)
        rows = zip(boxes, scores, scales, strict=True)
        return [self._raw.found(places, values, self.size, scale) for places, values, scale in rows]

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        return self._scores.figures(seed)
