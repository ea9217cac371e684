"""Of detectors: which of the original's confident boxes another network finds again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from sharefold.outputs.figure import Figure
from sharefold.outputs.intervals import wilson

CONFIDENT = 0.25
SAME_PLACE = 0.5  # IoU
SAME_SCORE = 0.5  # of the original's score; a fixed threshold would lose what stands just above it by chance


def anchors_found(boxes: Tensor, scores: Tensor, other_boxes: Tensor, other_scores: Tensor) -> tuple[int, int]:
    """(found again, confident) over all anchors of some images.

    Args:
        boxes, other_boxes: (n, anchors, 4), corners or centres and sizes.
        scores, other_scores: (n, anchors, classes) from 0 to 1.
    """
    best, classes = scores.max(-1)
    sure = best >= CONFIDENT
    if not bool(sure.any()):  # the surest anchor of every image is all there is
        sure = best == best.amax(1, keepdim=True)
    same = other_scores.max(-1).indices == classes
    strong = other_scores.gather(-1, classes[..., None]).squeeze(-1) >= SAME_SCORE * best
    here, there = boxes[sure].float(), other_boxes[sure].float()
    corners = are_corners(boxes, sure)
    near = _overlaps(*(one if corners else box_convert(one, "cxcywh", "xyxy") for one in (here, there))) >= SAME_PLACE
    return int((near & same[sure] & strong[sure]).sum()), int(sure.sum())


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


def figure_of_anchors(name: str, found: int, confident: int, images: int) -> Figure:
    """The share of confident anchors that are found again."""
    return Figure(name, "detections", "found", found / max(confident, 1), wilson(found / max(confident, 1), confident), images)


def figure_of_detections(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Figure:
    """Of networks that return boxes (k, 4) as corners, labels (k,) and scores (k,) an image; NaN where none is confident.

    Args:
        pairs: an image each: what the original and the other network return for it.
    """
    found = confident = 0
    for ours, theirs in pairs:
        sure = ours["scores"] >= CONFIDENT
        confident += int(sure.sum())
        if bool(sure.any()) and len(theirs["boxes"]):
            near = box_iou(ours["boxes"][sure].float(), theirs["boxes"].float()) >= SAME_PLACE
            same = ours["labels"][sure][:, None] == theirs["labels"][None]
            strong = theirs["scores"][None] >= SAME_SCORE * ours["scores"][sure][:, None]
            found += int((near & same & strong).any(1).sum())
    if confident == 0:
        return Figure("detections", "detections", "found", math.nan, (0.0, 1.0), len(pairs))
    return figure_of_anchors("detections", found, confident, len(pairs))
