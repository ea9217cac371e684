"""A small detector, trained here on drawn shapes and converted: mAP before and after.

    python benchmarks/detector.py --refine 2m

The detector of ``shapes.py`` is trained from scratch for ``--minutes`` by one thread on 10,000 drawn scenes and converted with a
thousand other ones, without their boxes, on default settings. Measured on 2,000 more scenes: mAP by torchmetrics (the mean over
IoU thresholds from 0.5 to 0.95 and classes, as for COCO) of both networks, and what the conversion says by itself. One row in
``benchmarks/results/tasks.json``, beside those of ``tasks.py``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from finetune_cifar import write
from shapes import SIDE, Detector, Scenes, detections, loss, scenes
from tasks import CALIBRATION, RESULTS, TESTED, converted, train
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

TRAINED = 10_000
BUDGET, MOST = "50%", 1.0  # points of mAP


def trained(seen: Scenes, minutes: float) -> tuple[Detector, int]:
    """The network after so many minutes, and the number of updates."""
    torch.manual_seed(0)
    net, random = Detector(), torch.Generator().manual_seed(0)

    def batch_loss(update: int) -> Tensor:
        pick = torch.randint(0, len(seen.images), (32,), generator=random)
        images, boxes = seen.images[pick], [seen.boxes[i] for i in pick]
        if update % 2:
            images, boxes = images.flip(3), [torch.stack([SIDE - b[:, 2], b[:, 1], SIDE - b[:, 0], b[:, 3]], 1) for b in boxes]
        return loss(net(images), boxes, [seen.labels[i] for i in pick])

    return net, train(net, batch_loss, minutes)


def precision(net: nn.Module, seen: Scenes) -> dict[str, float]:
    """mAP, and at IoU 0.5 and 0.75 alone, each from 0 to 1."""
    metric = MeanAveragePrecision(backend="faster_coco_eval")
    truth = [{"boxes": boxes, "labels": labels} for boxes, labels in zip(seen.boxes, seen.labels, strict=True)]
    metric.update(detections(net, seen.images), truth)
    found = metric.compute()
    return {key: float(found[key]) for key in ("map", "map_50", "map_75")}


def measure(minutes: float, seed: int, refine: str | None) -> dict[str, Any]:
    net, updates = trained(scenes(TRAINED, 1), minutes)
    tested = scenes(TESTED, 3)
    before = precision(net, tested)

    def lost(model: nn.Module) -> dict[str, Any]:
        after = precision(model, tested)
        fallen = 100 * (before["map"] - after["map"])
        return {"before": before["map"], "after": after["map"], "precision": [before, after], "lost": fallen}

    found = converted(net, scenes(CALIBRATION, 2).images, BUDGET, lost, most=MOST, seed=seed, refine=refine)
    return {"task": "detector", "updates": updates, "minutes": minutes, "unit": "points of mAP lost", **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of training the network")
    parser.add_argument("--refine", metavar="EFFORT", help="also refined so long: 2m, or so many epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    row = measure(options.minutes, options.seed, options.refine)
    print(json.dumps(row), flush=True)
    write(options.out, row, ("task", "seed"))


if __name__ == "__main__":
    main()
