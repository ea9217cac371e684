"""Claimed agreement against agreement on new images: does the truth lie inside the interval that the command prints?

    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/agreement.py --networks resnet20 resnet56
    python benchmarks/agreement.py --networks lite0 --lite0 lite0.safetensors --imagenet imagenet.npz

ResNet-20 and -56: 2,000 training images of CIFAR-10 to calibrate, all 10,000 test images for the truth. EfficientNet-Lite0
(timm:tf_efficientnet_lite0): the 1,000 train images of the npz file to calibrate, its test images for the truth. No label is
read anywhere. Converted networks are kept in `--cache`, so that only what is estimated is measured again.

Writes results/agreement.json and prints a table.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import WEIGHTS, data_folder, hardware, read_split
from torch import Tensor, nn

import sharefold
from sharefold.calibration.new_images import seen_before, stand_ins
from sharefold.calibration.parts import parts_of
from sharefold.data import Preprocess
from sharefold.measure import agreement, count_parameters
from sharefold.outputs.intervals import wilson
from sharefold.planner import Planner

RESULTS = Path(__file__).parent / "results"
SIZES = {"resnet20": ("65%", "50%", "35%"), "resnet56": ("65%", "50%", "35%"), "lite0": ("80%", "65%", "50%")}
CALIBRATION = 2000


def load(network: str, seed: int, options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], Tensor, Tensor]:
    """The dense network, its configuration, the calibration images and the test images, normalised."""
    if network == "lite0":
        source = sharefold.open_source(options.lite0, arch="timm:tf_efficientnet_lite0")
        with np.load(options.imagenet) as file:
            train, test = file["train_x"], file["test_x"]
    else:
        source = sharefold.open_source(str(data_folder() / "weights" / WEIGHTS[network]))
        train, test = (read_split(data_folder(), split)[0] for split in ("train", "test"))
    pick = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:CALIBRATION].sort().values
    preprocess = Preprocess.from_cfg(source.pretrained_cfg)
    images, new = (preprocess.normalize(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (train[pick.numpy()], test))
    return source.model, {"base": source.base, "pretrained_cfg": source.pretrained_cfg}, images, new


def convert(model: nn.Module, config: dict[str, Any], new: Tensor, size: str, planner: Planner, file: Path) -> dict[str, Any]:
    """One converted network, written to ``file``, and its agreement on all the test images: the truth."""
    start, trial = time.process_time(), copy.deepcopy(model)
    sharefold.convert_(trial, planner.plan(size), planner.cal, config=config)
    sharefold.save(trial, file, force=True)
    row = {"parameters": count_parameters(trial), "cpu_seconds": round(time.process_time() - start, 1)}
    truth = agreement(model, trial, new, batch_size=100)
    return {**row, "test_agreement": truth.top1, "test_kl": truth.kl, "test_images": len(new)}


def estimate(model: nn.Module, converted: nn.Module, images: Tensor, seed: int) -> dict[str, Any]:
    """What the command says of ``converted``: the same figures as in :class:`sharefold.Conversion`."""
    report = images[parts_of(len(images), seed).report]
    views = stand_ins(report, seed)
    row: dict[str, Any] = {"report_images": len(report), "seen_before": seen_before(model, report, views)}
    for name, shown in (("", report), ("new_", views)):
        found = agreement(model, converted, shown, batch_size=100)
        row |= {f"{name}agreement": found.top1, f"{name}kl": found.kl}
        row[f"{name}agreement_interval"] = wilson(found.top1, len(report))
    return row


def measure(network: str, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model, config, images, new = load(network, seed, options)
    planner = Planner(sharefold.calibrate(model, images, seed=seed))
    for size in options.sizes or SIZES[network]:
        file = options.cache / f"{network}-{size.rstrip('%')}-{seed}.safetensors"
        notes = file.with_suffix(".json")
        if not notes.exists():
            notes.write_text(json.dumps(convert(model, config, new, size, planner, file)))
        known = json.loads(notes.read_text())
        row = {"network": network, "size": size, "seed": seed, "images": len(images), **known}
        yield {**row, **estimate(model, sharefold.load(file), images, seed)}


def table(rows: list[dict[str, Any]]) -> str:
    """Claims against the truth; a star where the truth lies inside the interval."""

    def told(row: dict[str, Any], name: str) -> str:
        low, high = row[f"{name}agreement_interval"]
        inside = "*" if low <= row["test_agreement"] <= high else ""
        return f"{100 * row[f'{name}agreement']:.1f} ({100 * low:.1f} to {100 * high:.1f}){inside}"

    head = ["network", "size", "on report images", "on mild views of them", "seen before", "on test images"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [
        f"| {r['network']} | {r['size']} | {told(r, '')} | {told(r, 'new_')} | {'yes' if r['seen_before'] else 'no'} | "
        f"{100 * r['test_agreement']:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=["resnet20", "resnet56"])
    parser.add_argument("--sizes", nargs="+", help="default: by network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--lite0", type=Path, help="weights of EfficientNet-Lite0")
    parser.add_argument("--imagenet", type=Path, help="npz file with train_x and test_x, uint8 224 x 224")
    parser.add_argument("--cache", type=Path, default=Path("agreement-cache"), help="where converted networks are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "agreement")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    target = options.out.with_suffix(".json")
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    for network in options.networks:
        for seed in options.seeds:
            for row in measure(network, seed, options):
                rows = [r for r in rows if any(r[k] != row[k] for k in ("network", "size", "seed"))] + [row]
                target.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
