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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import WEIGHTS, data_folder, hardware, read_split
from torch import Tensor, nn

import sharefold
from sharefold.data import Preprocess
from sharefold.measure import agreement, count_parameters
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


def convert(
    model: nn.Module, config: dict[str, Any], images: Tensor, new: Tensor, size: str, planner: Planner, file: Path
) -> dict[str, Any]:
    """One converted network, written to ``file``, and its row."""
    start, trial = time.process_time(), copy.deepcopy(model)
    plan = planner.plan(size)
    done = sharefold.convert_(trial, plan, planner.cal, config=config)
    sharefold.save(trial, file, force=True)
    row = {"parameters": count_parameters(trial), "cpu_seconds": round(time.process_time() - start, 1)}
    row.update(
        seen_before=done.seen_before, new_agreement=done.new_agreement, new_agreement_interval=done.new_agreement_interval
    )
    row.update(agreement=done.agreement, agreement_interval=done.agreement_interval, report_images=done.report_images, kl=done.kl)
    truth = agreement(model, trial, new, batch_size=100)
    return {**row, "test_agreement": truth.top1, "test_kl": truth.kl, "test_images": len(new)}


def measure(network: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, config, images, new = load(network, seed, options)
    planner = Planner(sharefold.calibrate(model, images, seed=seed))
    rows = []
    for size in options.sizes or SIZES[network]:
        file = options.cache / f"{network}-{size.rstrip('%')}-{seed}.safetensors"
        notes = file.with_suffix(".json")
        if not notes.exists():
            notes.write_text(json.dumps(convert(model, config, images, new, size, planner, file)))
        row = {"network": network, "size": size, "seed": seed, "images": len(images), **json.loads(notes.read_text())}
        rows.append(row)
        print(row, flush=True)
    return rows


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


if __name__ == "__main__":
    main()
