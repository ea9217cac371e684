"""The drawn scenes and the measure of ``benchmarks/detector.py``: a network that knows the truth must have full marks."""

from __future__ import annotations

import sys

import pytest
import torch
from doc_blocks import ROOT
from script_loader import load_script
from torch import Tensor, nn

shapes = load_script("benchmarks/shapes.py")


class Truth(nn.Module):
    """Says what stands in scenes, in their order: box and class of each shape at the places near its centre."""

    def __init__(self, boxes: list[Tensor], labels: list[Tensor]) -> None:
        super().__init__()
        self.boxes, self.labels, self.next = boxes, labels, 0
        self.places = shapes.Detector().places

    def forward(self, images: Tensor) -> Tensor:
        found = torch.zeros(len(images), 4 + shapes.CLASSES, self.places.shape[1])
        for one in found:
            for box, label in zip(self.boxes[self.next], self.labels[self.next], strict=True):
                centre = (box[:2] + box[2:]) / 2
                near = (self.places - centre[:, None]).abs().amax(0) < shapes.NEAR * shapes.STRIDE
                one[:4, near], one[4 + label, near] = box[:, None], 1.0
            self.next += 1
        return found


def test_boxes_hold_their_shapes() -> None:
    drawn = shapes.scenes(30, 0)
    assert drawn.images.shape == (30, 3, 64, 64) and 0 <= float(drawn.images.min()) < float(drawn.images.max()) <= 1
    boxes = torch.cat(drawn.boxes)
    assert float(boxes.min()) >= 0 and float(boxes.max()) <= 64
    sides = boxes[:, 2:] - boxes[:, :2]
    assert float(sides.min()) >= 5 and float(sides.max()) <= shapes.SIZES[1] + 1
    assert set(torch.cat(drawn.labels).tolist()) == {0, 1, 2}
    again = shapes.scenes(30, 0)
    assert torch.equal(again.images, drawn.images) and torch.equal(torch.cat(again.boxes), boxes)


def test_the_truth_has_full_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    detector = load_script("benchmarks/detector.py", "detector_benchmark")
    drawn = shapes.scenes(40, 1)
    found = detector.precision(Truth(drawn.boxes, drawn.labels), drawn)
    assert found == pytest.approx({"map": 1, "map_50": 1, "map_75": 1}, abs=0.02)
    moved = [box + 0.2 * (box[:, 2:] - box[:, :2]).repeat(1, 2) for box in drawn.boxes]  # IoU 0.64 / 1.36
    assert detector.precision(Truth(moved, drawn.labels), drawn)["map_50"] < 0.1
    assert detector.precision(Truth(drawn.boxes, [(label + 1) % 3 for label in drawn.labels]), drawn)["map"] < 0.1


def test_the_loss_of_the_truth_is_the_lowest() -> None:
    drawn = shapes.scenes(8, 2)
    right = Truth(drawn.boxes, drawn.labels)(drawn.images)
    best = float(shapes.loss(right, drawn.boxes, drawn.labels))
    assert best == pytest.approx(0, abs=0.05)
    blurred = right.clone()
    blurred[:, 4:] = 0.9 * blurred[:, 4:] + 0.03
    shifted = right.clone()
    shifted[:, :4] += 2
    assert float(shapes.loss(blurred, drawn.boxes, drawn.labels)) > best + 0.05
    assert float(shapes.loss(shifted, drawn.boxes, drawn.labels)) > best + 0.05
