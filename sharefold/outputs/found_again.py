"""Of detectors: which of the original's confident boxes another network finds again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from sharefold.outputs.figure import Figure
from sharefold.outputs.intervals import of_ratio

CONFIDENT = 0.25
SAME_PLACE = 0.5  # IoU
SAME_SCORE = 0.5  # of the original's score; a fixed threshold would lose what stands just above it by chance


def anchors_found(boxes: Tensor, scores: Tensor, other_boxes: Tensor, other_scores: Tensor) -> Tensor:
    """(n, 2, 2) of some images, an image each: confident anchors that are found again, and all of them; then the same of the
    surest anchor, which is all there is where a network is never confident.

    Args:
        boxes, other_boxes: (n, anchors, 4), corners or centres and sizes.
        scores, other_scores: (n, anchors, classes) from 0 to 1.
    """
    best, classes = scores.max(-1)
    confident, surest = best >= CONFIDENT, best == best.amax(1, keepdim=True)
    sure = confident if bool(confident.any()) else surest
    same = other_scores.max(-1).indices == classes
    strong = other_scores.gather(-1, classes[..., None]).squeeze(-1) >= SAME_SCORE * best
    here, there = boxes.flatten(0, 1).float(), other_boxes.flatten(0, 1).float()
    corners = are_corners(boxes, sure)
    overlaps = _overlaps(*(one if corners else box_convert(one, "cxcywh", "xyxy") for one in (here, there)))
    again = (overlaps >= SAME_PLACE).reshape(best.shape) & same & strong
    return torch.stack([torch.stack([(again & one).sum(1), one.sum(1)], 1) for one in (confident, surest)], 1).cpu()


def are_corners(boxes: Tensor, sure: Tensor) -> bool:
    """Whether ``boxes`` (n, anchors, 4) are corners x1, y1, x2, y2, else centres and sizes; ``sure`` (n, anchors) are confident.

    Corners stand in order in every confident box. So do centre and size where all objects fill their pictures; then the other
    anchors tell, most of which are smaller than their distance from the upper left.
    """
    ordered = (boxes[..., 2:] > boxes[..., :2]).all(-1)
    return bool(ordered[sure].all()) and float(ordered.float().mean()) > 0.5


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """IoU (k,) of pairs of boxes (k, 4); of boxes without an area, whether they are the same."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    areas = [(one[:, 2:] - one[:, :2]).clamp_min(0).prod(1) for one in (a, b)]
    union = areas[0] + areas[1] - shared
    return torch.where(union > 0, shared / union.clamp_min(1e-12), torch.isclose(a, b).all(1).float())


def figure_of_anchors(name: str, counts: Tensor) -> Figure:
    """The share of confident anchors that are found again, by what :func:`anchors_found` counted; of surest ones where none is
    confident."""
    kind = 0 if bool(counts[:, 0, 1].any()) else 1
    return _figure(name, counts[:, kind])


def _figure(name: str, counts: Tensor) -> Figure:
    """Of (n, 2), an image each: found again, and all; NaN where there is none."""
    found, sure = counts.sum(0).tolist()
    return Figure(name, "detections", "found", found / sure if sure else math.nan, of_ratio(*counts.unbind(1)), len(counts))


def figure_of_detections(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Figure:
    """Of networks that return boxes (k, 4) as corners, labels (k,) and scores (k,) an image; NaN where none is confident.

    Args:
        pairs: an image each: what the original and the other network return for it.
    """
    counts = torch.zeros(len(pairs), 2, dtype=torch.long)
    for index, (ours, theirs) in enumerate(pairs):
        sure = ours["scores"] >= CONFIDENT
        counts[index, 1] = sure.sum()
        if bool(sure.any()) and len(theirs["boxes"]):
            near = box_iou(ours["boxes"][sure].float(), theirs["boxes"].float()) >= SAME_PLACE
            same = ours["labels"][sure][:, None] == theirs["labels"][None]
            strong = theirs["scores"][None] >= SAME_SCORE * ours["scores"][sure][:, None]
            counts[index, 0] = (near & same & strong).any(1).sum()
    return _figure("detections", counts)
