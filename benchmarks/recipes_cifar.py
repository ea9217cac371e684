"""What each recipe costs on CIFAR-10: after conversion, after refinement without labels, after a short fine-tune.

    export SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=1
    python benchmarks/recipes_cifar.py --networks resnet20 --refine 10 --images 10000
    python benchmarks/recipes_cifar.py --networks resnet56 --refine 2 --images 2000 --test-images 3000
    python benchmarks/recipes_cifar.py --data cifar10.npz --weights ../weights --networks resnet56 --recipes sharesnet

Conversion takes 1,000 training images without labels, refinement the same images, the fine-tune labelled training
images with the dense network as teacher. Top-1 is of the test images. One record a (network, recipe, seed, epochs);
records of earlier runs stay. grouped-pointwise is missing because these networks have no 1x1 convolutions.
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
from sharefold.finetune.loop import finetune
from sharefold.measure import count_parameters
from sharefold.recipes import build_plan
from sharefold.repair.refine import refine
from sharefold.sources import open_source

RESULTS = Path(__file__).parent / "results" / "recipes_cifar.json"
RECIPES = (
    "sharesnet", "kernel-sharing", "layer-reuse", "filter-bases:shared=8,unique=1", "filter-bases:shared=16,unique=1",
    "filter-bases:shared=16,unique=1,bases=2",
)  # fmt: skip
# Top-1 of the same form trained from scratch, for the paper's own 300 epochs (README of the authors' repository).
PUBLISHED = {
    ("resnet56", "filter-bases:shared=8,unique=1"): 0.9248,
    ("resnet56", "filter-bases:shared=16,unique=1"): 0.9254,
    ("resnet56", "filter-bases:shared=16,unique=1,bases=2"): 0.9370,
}


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor, normalize: Any) -> float:
    """Share of ``images`` (n, 3, 32, 32) uint8 that the model classifies rightly."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((model(normalize(x)).argmax(1) == y).sum()) for x, y in batches) / len(images)


def read(options: argparse.Namespace) -> tuple[dict[str, tuple[Tensor, Tensor]], Path]:
    """uint8 images (n, 3, 32, 32) and labels of both splits, and the folder of weights."""
    if options.data:
        arrays = np.load(options.data)
        splits = {split: (arrays[f"{split}_x"], arrays[f"{split}_y"]) for split in ("train", "test")}
        folder = options.weights
    else:
        splits = {split: read_split(data_folder(), split) for split in ("train", "test")}
        folder = options.weights or data_folder() / "weights"
    tensors = {
        split: (torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), torch.from_numpy(y.astype(np.int64)))
        for split, (x, y) in splits.items()
    }
    return tensors, folder


def measure(network: str, recipe: str, dense: nn.Module, data: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One recipe on one network."""
    model, seed = copy.deepcopy(dense), options.seed
    plan = build_plan(recipe, model)
    seconds, accuracy = {}, {}

    def lap(name: str, start: float) -> None:
        seconds[name] = round(time.perf_counter() - start, 1)
        accuracy[name] = top1(model, *data["test"], data["normalize"])
        print(network, recipe, name, f"{accuracy[name]:.4f}", f"{seconds[name]} s", flush=True)

    start = time.perf_counter()
    cal = sharefold.calibrate(model, data["calibration"], seed=seed)
    done = sharefold.convert_(model, plan, cal)
    lap("converted", start)
    if options.refine:
        start = time.perf_counter()
        # Its teacher's channels may come in another order than those of the calibrated network (layer reuse).
        refine(model, cal.of(done.original), epochs=options.refine, seed=seed)
        lap("refined", start)
    if options.epochs:
        start = time.perf_counter()
        train = data["train"]
        finetune(model, train, teacher=dense, epochs=options.epochs, seed=seed, device="cpu", quiet=True)
        lap("finetuned", start)
    return {
        "network": network, "recipe": recipe, "seed": seed, "params_before": count_parameters(dense),
        "params_after": count_parameters(model), "top1": accuracy, "top1_published": PUBLISHED.get((network, recipe)),
        "refine_epochs": options.refine, "calibration_images": len(data["calibration"]),
        "finetune_epochs": options.epochs, "finetune_images": len(data["train"][0]),
        "test_images": len(data["test"][0]), "seconds": seconds, "hardware": hardware(),
    }  # fmt: skip


def key(record: dict[str, Any]) -> tuple[Any, ...]:
    return record["network"], record["recipe"], record["seed"]


def write(path: Path, record: dict[str, Any]) -> None:
    """Puts a record into the file, in place of an earlier one of the same network, recipe and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    records = sorted([r for r in old if key(r) != key(record)] + [record], key=lambda r: str(key(r)))
    path.write_text(json.dumps(records, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(WEIGHTS), choices=list(WEIGHTS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--data", help="npz file with train_x, train_y, test_x, test_y (uint8 NHWC)")
    parser.add_argument("--weights", type=Path, help="folder with the public weight files")
    parser.add_argument("--refine", type=int, default=30, help="epochs of refinement without labels; 0 for none")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of fine-tuning; 0 for none")
    parser.add_argument("--images", type=int, default=20_000, help="labelled training images for the fine-tune")
    parser.add_argument("--test-images", type=int, default=10_000, help="the first so many of the test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    tensors, folder = read(options)
    tensors["test"] = tuple(t[: options.test_images] for t in tensors["test"])
    if folder is None:
        parser.error("--data needs --weights, the folder with the public weight files")
    for network in options.networks:
        dense = open_source(str(folder / WEIGHTS[network])).model.eval()
        preprocess = Preprocess.from_cfg(dense.pretrained_cfg)
        generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(tensors["train"][0]), generator=generator)
        images, labels = tensors["train"]
        data = {
            "normalize": preprocess.normalize, "test": tensors["test"],
            "calibration": preprocess.normalize(images[order[:1000]]),
            "train": (images[order[: options.images]], labels[order[: options.images]]),
        }  # fmt: skip
        size = count_parameters(dense)
        original = {
            "network": network, "recipe": "original", "seed": options.seed, "params_before": size,
            "params_after": size, "top1": {"original": top1(dense, *data["test"], preprocess.normalize)},
            "test_images": len(data["test"][0]), "hardware": hardware(),
        }  # fmt: skip
        write(options.out, original)
        for recipe in options.recipes:
            write(options.out, measure(network, recipe, dense, data, options))


if __name__ == "__main__":
    main()
