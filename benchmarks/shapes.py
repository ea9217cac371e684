"""Pictures of circles, squares and triangles among noise and clutter, and a small detector that finds them.

The detector is of one stage and without anchors: a box and three scores from each place of one map, as four distances to the
box's sides (FCOS, Tian et al., https://arxiv.org/abs/1904.01355), learned by the GIoU of boxes (Rezatofighi et al.,
https://arxiv.org/abs/1902.09630) and by scores that shall be the IoU of the place's own box (Zhang et al.,
https://arxiv.org/abs/2008.13367).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, generalized_box_iou_loss

SIDE, STRIDE, CLASSES = 64, 4, 3
SIZES = (9.0, 26.0)  # of shapes, pixels
MOST_SHAPES = 5
NOISE = 0.06
NEAR = 1.5  # strides from the centre of a shape within which places answer for it


@dataclass(frozen=True)
class Scenes:
    """Images (n, 3, 64, 64) from 0 to 1; of each its boxes (k, 4), corners in pixels, and labels (k,)."""

    images: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]

    def __getitem__(self, part: slice) -> Scenes:
        return Scenes(self.images[part], self.boxes[part], self.labels[part])


def scenes(count: int, seed: int) -> Scenes:
    random = np.random.default_rng(seed)
    drawn = [_scene(random) for _ in range(count)]
    images = torch.from_numpy(np.stack([image for image, _, _ in drawn]))
    return Scenes(images, [torch.tensor(b).float() for _, b, _ in drawn], [torch.tensor(k) for _, _, k in drawn])


def _scene(random: np.random.Generator) -> tuple[np.ndarray, list[list[float]], list[int]]:
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    slope = random.normal(0, 0.15, (3, 2, 1, 1)) / SIDE
    image = random.uniform(0.2, 0.8, (3, 1, 1)) + slope[:, 0] * (x - SIDE / 2) + slope[:, 1] * (y - SIDE / 2)
    for _ in range(random.integers(2, 6)):  # lines and specks, which are nothing to find
        (x1, y1), angle, length = random.uniform(0, SIDE, 2), random.uniform(0, math.pi), random.uniform(2, 40)
        along = (x - x1) * math.cos(angle) + (y - y1) * math.sin(angle)
        across = -(x - x1) * math.sin(angle) + (y - y1) * math.cos(angle)
        line = (np.abs(along) < length / 2) & (np.abs(across) < random.uniform(0.7, 1.5))
        image = np.where(line, random.uniform(0, 1, (3, 1, 1)), image)
    taken, boxes, labels = np.zeros((SIDE, SIDE), bool), [], []
    for _ in range(random.integers(1, MOST_SHAPES + 1)):
        label = int(random.integers(CLASSES))
        for _ in range(20):  # shapes may touch, and not hide each other
            inside = _shape(label, random, x, y)
            if not (inside & taken).any():
                break
        else:
            continue
        taken |= inside
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        labels.append(label)
        colour = random.uniform(0, 1, (3, 1, 1))
        around = image[:, inside].mean(1).reshape(3, 1, 1)
        if np.abs(colour - around).max() < 0.25:
            colour = (around + 0.5) % 1
        image = np.where(inside, colour, image)
    return np.clip(image + random.normal(0, NOISE, image.shape), 0, 1).astype(np.float32), boxes, labels


def _shape(label: int, random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The pixels inside of a circle, a square or a triangle, turned by any angle, wholly in the picture."""
    radius = random.uniform(*SIZES) / 2
    x0, y0 = random.uniform(radius + 1, SIDE - radius - 1, 2)
    x, y = (x - x0) / radius, (y - y0) / radius
    if label == 0:
        return x * x + y * y < 1
    corners = 4 if label == 1 else 3
    angles = random.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(corners) / corners
    reach = math.cos(math.pi / corners)  # of a side's middle, where the corners are at 1
    return np.all([x * math.cos(a) + y * math.sin(a) < reach for a in angles], axis=0)


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Gives (n, 4 + 3, 256): corners in pixels, then scores from 0 to 1, of every place of a map of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
        self.high = nn.Sequential(*[block(32, 32) for _ in range(3)])
        self.low = nn.Sequential(block(32, 64, 2), *[block(64, 64) for _ in range(4)])
        self.neck = block(96, 48)
        self.score_tower = nn.Sequential(block(48, 48), block(48, 48))
        self.box_tower = nn.Sequential(block(48, 48), block(48, 48))
        self.scores, self.sides = nn.Conv2d(48, CLASSES, 3, padding=1), nn.Conv2d(48, 4, 3, padding=1)
        nn.init.constant_(self.scores.bias, -4.0)
        nn.init.constant_(self.sides.bias, 1.0)
        steps = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)
        self.register_buffer("places", places)  # (2, 256): x, y

    def forward(self, images: Tensor) -> Tensor:
        high = self.high(self.stem(images))
        maps = self.neck(torch.cat([high, F.interpolate(self.low(high), scale_factor=2.0)], 1))
        sides = STRIDE * F.softplus(self.sides(self.box_tower(maps)).flatten(2))
        boxes = torch.cat([self.places - sides[:, :2], self.places + sides[:, 2:]], 1)
        return torch.cat([boxes, self.scores(self.score_tower(maps)).flatten(2).sigmoid()], 1)


def loss(found: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
    """Of a batch, over the number of places that answer for a shape."""
    steps = (torch.arange(SIDE // STRIDE) + 0.5) * STRIDE
    places = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)  # (256, 2)
    total, count = found.new_zeros(()), 0
    for one, theirs, kinds in zip(found, boxes, labels, strict=True):
        centres = (theirs[:, :2] + theirs[:, 2:]) / 2
        far = (places[:, None] - centres).abs().amax(2)  # (256, k)
        distance, nearest = far.min(1)
        sure = distance < NEAR * STRIDE
        chosen = nearest[sure]
        ours = one[:4, sure].T
        wanted = torch.zeros_like(one[4:])
        if len(chosen):
            quality = box_iou(ours.detach(), theirs)[torch.arange(len(chosen)), chosen]
            wanted[kinds[chosen], sure.nonzero()[:, 0]] = quality
            total = total + 2 * generalized_box_iou_loss(ours, theirs[chosen], reduction="sum")
        scores = one[4:]
        weight = torch.where(wanted > 0, wanted, 0.75 * scores.detach().square())
        total = total + (weight * F.binary_cross_entropy(scores, wanted, reduction="none")).sum()
        count += len(chosen)
    return total / max(count, 1)


@torch.no_grad()
def detections(net: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """What is left of the places with a score of at least 0.02 when of overlapping boxes of a class the surest stays."""
    found = []
    for one in torch.cat([net(part) for part in images.split(250)]):
        scores, labels = one[4:].max(0)
        some = scores > 0.02
        boxes, scores, labels = one[:4, some].T, scores[some], labels[some]
        kept = batched_nms(boxes, scores, labels, 0.6)[:50]
        found.append({"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]})
    return found
