"""Networks whose answers are known, and pictures with their truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sharefold.data import Pairs, open_data, with_truth

# Pixels go in from 0 to 1, 20 wide and 20 high.
CFG = {"input_size": (3, 20, 20), "mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}
STEP = 40  # of grey between two classes
BLOCK = (8, 4, 24, 12)  # corners in a picture 40 wide and 20 high; at 20 x 20 they are whole pixels too


class Says(nn.Module):
    """A network that is a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def colours(classes: int) -> Says:
    """Tells the class of a pixel by its grey: 0, 40, 80 ..."""

    def logits(x: Tensor) -> Tensor:
        return -((x[:, :1] * 255 / STEP - torch.arange(classes).view(1, -1, 1, 1)) ** 2)

    return Says(logits)


def corners_of(x: Tensor) -> Tensor:
    """(n, 4): the box around what is bright in each image."""
    found = []
    for image in x[:, 0] > 0.5:
        rows, columns = image.any(1).nonzero(), image.any(0).nonzero()
        found.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if len(rows) else [0, 0, 1, 1])
    return torch.tensor(found, dtype=torch.float32)


def detector(label: int) -> Says:
    """As torchvision's: the bright block is of the category ``label``."""

    def detections(x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": box[None], "labels": torch.tensor([label]), "scores": torch.tensor([0.9])} for box in corners_of(x)]

    return Says(detections)


def raw_detector(classes: int, best: int, *, corners: bool = False, side: float = 1.0) -> Says:
    """As YOLO's: (n, 4 + classes, 12 anchors), the bright block twice, one of the two a little off and less sure, and ten small
    boxes on the right that nothing is in; lengths are divided by ``side``."""

    def anchors(x: Tensor) -> Tensor:
        box = corners_of(x)
        boxes = torch.stack([box, box + 0.5, *(torch.tensor([17.0, y, 18.0, y + 1]).expand(len(x), 4) for y in range(5, 15))], 2)
        if not corners:
            low, high = boxes[:, :2], boxes[:, 2:]
            boxes = torch.cat([(low + high) / 2, high - low], 1)
        scores = torch.full((len(x), classes, 12), 0.0001)
        scores[:, best, 0], scores[:, best, 1] = 0.9, 0.8
        return torch.cat([boxes / side, scores], 1)

    return Says(anchors)


def save(pixels: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def grey(values: np.ndarray) -> np.ndarray:
    """(h, w, 3) of (h, w)."""
    return np.repeat(values.astype(np.uint8)[..., None], 3, 2)


def block_picture(height: int = 20, width: int = 40) -> np.ndarray:
    pixels = np.zeros((height, width), np.uint8)
    x1, y1, x2, y2 = BLOCK
    pixels[y1:y2, x1:x2] = 255
    return pixels


def coco(folder: Path, boxes: dict[str, list[tuple[int, list[float]]]], categories: list[int], **more: Any) -> Path:
    """An annotation file: of every picture (category, [x, y, width, height])."""
    images = [{"id": index, "file_name": name} for index, name in enumerate(boxes)]
    annotations = [
        {"image_id": index, "category_id": category, "bbox": box}
        for index, found in enumerate(boxes.values())
        for category, box in found
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": c, "name": f"kind {c}"} for c in categories]}
    (folder / "truth.json").write_text(json.dumps({**content, **more}))
    return folder / "truth.json"


def block_box() -> list[float]:
    x1, y1, x2, y2 = BLOCK
    return [x1, y1, x2 - x1, y2 - y1]


def opened(folder: Path, truth: Path | None, cfg: dict[str, Any] | None = None) -> Pairs:
    """Of the pictures in ``folder / "pictures"``."""
    return with_truth(open_data(f"imagefolder:{folder / 'pictures'}", transform_cfg=cfg or CFG), truth)


def enlarged(x: Tensor) -> Tensor:
    """Twice as wide and high."""
    return F.interpolate(x, scale_factor=2, mode="nearest")
