"""From what detectors say of an image to the objects that they have found in the picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from sharefold.errors import SharefoldError
from sharefold.outputs.found_again import CONFIDENT, are_corners

# Of raw boxes, those by which ultralytics validates its networks: least score, IoU from which two boxes are of one object, and
# most boxes of a picture, before overlapping ones go and after.
LEAST_SCORE, SAME_OBJECT, MOST_BEFORE, MOST_AFTER = 0.001, 0.7, 30_000, 300
_SHARES = 2.0  # boxes that reach no further are shares of the image: no pixels


@dataclass(frozen=True)
class Found:
    """What a network finds in one picture.

    Attributes:
        boxes: (k, 4) float32, corners x1, y1, x2, y2 in pixels of the picture.
        scores: (k,) float32.
        categories: (k,) int64, ids of the annotation file.
    """

    boxes: Tensor
    scores: Tensor
    categories: Tensor


def class_ids(classes: int, categories: Iterable[int]) -> Tensor:
    """The category that each of ``classes`` scores is of, (classes,) int64.

    Raises:
        SharefoldError: there are neither as many categories, nor one more scores than the largest id.
    """
    known = sorted(categories)
    if classes == len(known):
        return torch.tensor(known)
    if classes == known[-1] + 1:
        return torch.arange(classes)
    raise SharefoldError(
        f"truth: the network scores {classes} classes, the annotation file has {len(known)} categories, the largest with id "
        f"{known[-1]}: which class is which cannot be told: want {len(known)} or {known[-1] + 1}"
    )


def as_found(said: Mapping[str, Any], scale: tuple[float, float]) -> Found:
    """One picture's detections as networks of torchvision return them: labels are category ids.

    Args:
        said: boxes (k, 4) as corners, scores (k,), labels (k,).
        scale: of x and of y, from the network's input to the picture.
    """
    boxes, scores, labels = (said[key].detach().cpu() for key in ("boxes", "scores", "labels"))
    return Found(boxes.float() * torch.tensor(scale * 2), scores.float(), labels.long())


@dataclass(frozen=True)
class RawBoxes:
    """How a network writes its boxes, told once, on the first images.

    Attributes:
        corners: x1, y1, x2, y2, else centre, width, height.
        shares: of the image's sides, else in pixels of the network's input.
        ids: (classes,) categories of the scores.
    """

    corners: bool
    shares: bool
    ids: Tensor

    @classmethod
    def told(cls, boxes: Tensor, scores: Tensor, categories: Iterable[int]) -> RawBoxes:
        """By boxes (n, anchors, 4) and scores (n, anchors, classes) from 0 to 1 of some images.

        Raises:
            SharefoldError: other shapes, or as :func:`class_ids`.
        """
        if boxes.ndim != 3 or boxes.shape[2] != 4 or scores.shape[:2] != boxes.shape[:2]:
            raise SharefoldError(
                f"truth: boxes {tuple(boxes.shape)} and scores {tuple(scores.shape)}: want (images, anchors, 4) beside "
                "(images, anchors, classes)"
            )
        best = scores.amax(2)
        sure = (best >= CONFIDENT) | (best == best.amax(1, keepdim=True))
        return cls(are_corners(boxes, sure), float(boxes.abs().max()) <= _SHARES, class_ids(scores.shape[2], categories))

    def found(self, boxes: Tensor, scores: Tensor, size: tuple[int, int], scale: tuple[float, float]) -> Found:
        """What stands in one picture after overlapping boxes of a class have gone.

        Args:
            boxes: (anchors, 4).
            scores: (anchors, classes) from 0 to 1.
            size: (height, width) of the network's input.
            scale: of x and of y, from there to the picture.
        """
        anchor, index = (scores >= LEAST_SCORE).nonzero(as_tuple=True)
        values = scores[anchor, index].float()
        if len(values) > MOST_BEFORE:
            best = values.topk(MOST_BEFORE).indices
            anchor, index, values = anchor[best], index[best], values[best]
        places = boxes[anchor].float()
        places = places if self.corners else box_convert(places, "cxcywh", "xyxy")
        if self.shares:
            places = places * torch.tensor([size[1], size[0]] * 2)
        kept = batched_nms(places, values, index, SAME_OBJECT)[:MOST_AFTER]
        return Found(places[kept] * torch.tensor(scale * 2), values[kept], self.ids[index[kept]])
