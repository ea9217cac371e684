"""EfficientNet-Lite0 on ImageNet without labels: what each size keeps, straight and refined.

    python benchmarks/imagenet.py lite0.safetensors imagenet.npz --sizes 80% 65% 50%
    python benchmarks/imagenet.py lite0.safetensors imagenet.npz --sizes 80% --refine "" 10m
    python benchmarks/imagenet.py lite0.safetensors imagenet.npz --sizes 80% --calib none
    python benchmarks/imagenet.py lite0.safetensors imagenet.npz --sizes 80% --classes 500

``lite0.safetensors`` is a state dict of timm's ``tf_efficientnet_lite0``; ``imagenet.npz`` holds ``train_x`` (calibration
images; their labels ``train_y`` are read by ``--classes`` alone) and ``test_x``, ``test_y`` (measured), uint8 (n, 224, 224, 3).
Every finished row is written to ``benchmarks/results/imagenet.json`` at once (rows of one size share calibration and plan):
top-1, agreement and KL on the test images, what the conversion itself said of its agreement, CPU seconds, wall-clock and peak
memory of the process. With ``--classes`` the calibration images are of so many classes alone, drawn by the seed, and rows also
hold the KL on test images of those classes (``kl_seen``) and of the others (``kl_unseen``).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import hardware
from measuring import measured
from torch import Tensor, nn
from torch.utils.data import Subset

import sharefold
from sharefold.calibration.images import matched
from sharefold.data import Preprocess, calibration_images, open_data
from sharefold.measure import count_macs, count_parameters, peak_memory
from sharefold_cli.heap import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "imagenet.json"
ARCHITECTURE = "timm:tf_efficientnet_lite0"
# A row of the same settings takes the place of an older one.
KEY = ("size", "method", "refine", "calib", "calib_images", "seed", "classes")


def rows(model: nn.Module, images: Tensor, size: str, options: argparse.Namespace, dataset: Any) -> Iterator[dict[str, Any]]:
    """A row for each way to refine. Calibration and planning are done once, and count in each."""
    cpu, wall = time.process_time(), time.perf_counter()
    cal = sharefold.calibrate(copy.deepcopy(model), images, seed=options.seed)
    plan = sharefold.plan(copy.deepcopy(model), size, cal, method=options.method)
    planned = time.process_time() - cpu, time.perf_counter() - wall
    for refine in options.refine:
        yield row(model, plan, cal, refine, planned, size, options, dataset)


def row(
    model: nn.Module, plan: sharefold.Plan, cal: Any, refine: str, planned: tuple[float, float], size: str,
    options: argparse.Namespace, dataset: Any,
) -> dict[str, Any]:  # fmt: skip
    network = copy.deepcopy(model)
    cpu, wall = time.process_time(), time.perf_counter()
    done = sharefold.convert_(network, plan, cal, refine=refine or None)
    seconds = {
        "cpu_seconds": planned[0] + time.process_time() - cpu, "plan_cpu_seconds": planned[0],
        "wall_seconds": planned[1] + time.perf_counter() - wall,
    }
    images = cal.images
    found = measured(done.original, network, dataset)
    return {
        "network": "efficientnet_lite0", "size": size, "method": options.method, "refine": refine,
        "calib": options.calib, "calib_images": len(images), "classes": options.classes,
        **_apart(done.original, network, options, dataset),
        "seed": options.seed, "kept": count_parameters(network) / count_parameters(model), **found,
        "said_agreement": done.agreement, "said_interval": done.agreement_interval, "report_images": done.report_images,
        "macs_kept": count_macs(network, images[:1]) / count_macs(model, images[:1]),
        "methods": dict(Counter(group.method for group in done.plan.groups)),
        "steps": {name: record.to_dict() for name, record in done.steps.items() if name != "refit"},
        "refit": {key: done.steps["refit"].to_dict().get(key) for key in ("kept", "kl_before", "kl_after")},
        **seconds, "peak_memory_bytes": peak_memory(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def drawn_classes(options: argparse.Namespace, labels: np.ndarray) -> np.ndarray:
    """The classes that are calibrated with."""
    return np.random.default_rng(options.seed).permutation(np.unique(labels))[: options.classes]


def _apart(original: nn.Module, network: nn.Module, options: argparse.Namespace, dataset: Any) -> dict[str, float]:
    """KL on test images of the classes that were calibrated with, and of the others."""
    if not options.classes:
        return {}
    with np.load(options.data) as arrays:
        seen = np.isin(arrays["test_y"], drawn_classes(options, arrays["train_y"]))
    parts = {"kl_seen": seen, "kl_unseen": ~seen}
    return {
        name: measured(original, network, Subset(dataset, np.flatnonzero(part).tolist()))["kl"] for name, part in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sizes", nargs="+", default=["80%", "65%", "50%"])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--refine", nargs="+", default=[""], help="times such as 10m; an empty one does without")
    parser.add_argument("--calib", choices=["images", "none"], default="images")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--classes", type=int, help="calibrate with images of so many classes alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.classes and options.calib == "none":
        parser.error("--classes chooses calibration images: leave out --calib none")
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(options.threads)
    source = sharefold.open_source(options.weights, arch=ARCHITECTURE)
    preprocess = Preprocess.from_cfg(source.pretrained_cfg)
    given = f"npz:{options.data}" if options.calib == "images" else None
    images = calibration_images(given, preprocess, options.count, options.seed)
    if options.classes:
        with np.load(options.data) as arrays:
            wanted = np.isin(arrays["train_y"], drawn_classes(options, arrays["train_y"]))
            pick = np.random.default_rng(options.seed).permutation(np.flatnonzero(wanted))[: options.count]
            images = preprocess.batch(torch.from_numpy(arrays["train_x"][np.sort(pick)]))
    if given is None:
        images = matched(source.model, images, options.seed)
    dataset = open_data(f"npz:{options.data}", "test", transform_cfg=preprocess)
    for size in options.sizes:
        for record in rows(source.model, images, size, options, dataset):
            known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
            known = [one for one in known if [one.get(name) for name in KEY] != [record[name] for name in KEY]]
            RESULTS.write_text(json.dumps({"hardware": hardware(), "rows": [*known, record]}, indent=1) + "\n")
            told = ("size", "refine", "kept", "top1_dense", "top1", "agreement", "kl", "said_interval", "cpu_seconds")
            print({name: record[name] for name in told}, flush=True)


if __name__ == "__main__":
    main()
