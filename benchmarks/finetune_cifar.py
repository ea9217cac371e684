"""How much accuracy fine-tuning brings back on CIFAR-10: converts, fine-tunes, writes one JSON record a seed.

    torchrun --nproc-per-node 2 benchmarks/finetune_cifar.py resnet20-4epochs --source resnet20.th \\
        --data npz:cifar10.npz \\
        --set freeze_norm=true small_images=0.5 augment=crop2+flip lr=0.002   # two cores, 6 minutes
    python benchmarks/finetune_cifar.py resnet20 resnet56-319k resnet56-202k --source-dir weights --data ... --seeds 3

The cases and their targets stand in CASES. Calibration takes training images without labels, fine-tuning the training
images with labels and the dense network as teacher, top-1 is that of the last weights on all test images. Images a
second are those of training updates, for the converted and for the dense network, in the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cifar
import torch
from measuring import measured
from torch import nn

import sharefold
from sharefold.data import ArrayDataset, Preprocess, calibration_images, open_data
from sharefold.finetune.distributed import pick_device
from sharefold.finetune.loaders import limited
from sharefold.finetune.loop import finetune
from sharefold.sources import open_source

RESULTS = Path(__file__).parent / "results"
# Updates of the shorter of the two runs that images a second come from: without a GPU, and with one.
UPDATES = (10, 100)


@dataclass(frozen=True)
class Case:
    """A network, the parameters it may keep, how it is fine-tuned, and the top-1 it should reach."""

    weights: str
    params: int
    target: float | None
    epochs: int
    settings: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None


CASES = {
    "resnet20-4epochs": Case("resnet20-12fca82f.th", 94_400, 0.908, 4, minutes=10),
    "resnet20": Case("resnet20-12fca82f.th", 94_400, 0.917, 100),
    "resnet56-319k": Case("resnet56-4bfd9763.th", 319_226, 0.939, 100),
    "resnet56-202k": Case("resnet56-4bfd9763.th", 201_850, 0.932, 100),
}


def hardware() -> dict[str, Any]:
    """What the figures were taken on, the GPU included."""
    return {**cifar.hardware(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def converted(
    dense: nn.Module, data: str, cfg: dict[str, Any], params: int, method: str, seed: int, pivots: bool = True
) -> nn.Module:
    """A copy of ``dense``, on its device, within ``params`` parameters, from a thousand unlabelled training images."""
    model = copy.deepcopy(dense)
    images = calibration_images(data, Preprocess.from_cfg(cfg), 1000, seed, "train")
    cal = sharefold.calibrate(model, images, seed=seed)
    sharefold.convert_(model, sharefold.plan(model, params, cal, method=method, pivots=pivots), cal)
    return model


def start_of(
    dense: nn.Module, cfg: dict[str, Any], case: Case, data: str, seed: int, folder: Path | None, method: str = "auto"
) -> nn.Module:
    """The converted network that fine-tuning starts from, on the dense one's device: read from ``folder``, or made."""
    if folder is None:
        return converted(dense, data, cfg, case.params, method, seed)
    return sharefold.load(folder).to(next(dense.parameters()).device)


def halves(data: ArrayDataset) -> tuple[ArrayDataset, ArrayDataset]:
    """The first half of the images, by which ``finetune_recipes.py`` chooses, and the second, which decides nothing."""
    middle = len(data) // 2
    first, second = (
        ArrayDataset(data.images[part], data.labels[part], data.preprocess, classes=data.classes)
        for part in (slice(None, middle), slice(middle, None))
    )
    return first, second


def throughput(model: nn.Module, teacher: nn.Module, train: Any, settings: dict[str, Any], images: int) -> float:
    """Training images a second of a copy of ``model``: what twice as many images take longer, so that warming up and the
    recording of CUDA graphs, which a run pays for once, do not count. A run before both loads the libraries: on a GPU the first
    takes seconds for that alone, and their difference would be next to nothing."""
    model, seconds, count = copy.deepcopy(model), [], []
    for part in (images, images, 3 * images):
        few = limited(train, part)
        report = finetune(model, few, teacher=teacher, **{**settings, "epochs": 1, "warmup_epochs": 0.0}, quiet=True)
        seconds.append(report.seconds)
        count.append(report.updates * settings.get("batch_size", 128))
    return round((count[2] - count[1]) / max(seconds[2] - seconds[1], 1e-9), 1)


def measure(name: str, case: Case, source: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of one case."""
    opened = open_source(source, pretrained=not options.random)
    dense, cfg = opened.model, opened.pretrained_cfg
    train = open_data(options.data, "train", transform_cfg=cfg)
    test = open_data(options.data, "test", transform_cfg=cfg)
    if options.limit:
        train, test = limited(train, options.limit), limited(test, options.limit)
    start = time.perf_counter()
    dense = dense.to(pick_device(options.device))
    model = start_of(dense, cfg, case, options.data, seed, options.start, options.method)
    convert_seconds = time.perf_counter() - start
    settings = {"device": options.device, "seed": seed, **case.settings, **options.set}
    batch = settings.get("batch_size", 128)
    few = max(batch, min(UPDATES[torch.cuda.is_available()] * batch, len(train) // 3))
    settings["epochs"] = options.epochs or case.epochs
    if options.minutes:
        rate = throughput(model, dense, train, settings, few)
        settings["epochs"] = max(1, int(60 * options.minutes * rate / len(train)))
    start, cpu = time.perf_counter(), time.process_time()
    folder = options.run_dir / f"{name}-{options.method}-{seed}" if options.run_dir else None
    report = finetune(
        model, train, test, teacher=dense, quiet=options.quiet, run_dir=folder, resume=bool(folder), **settings
    )
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    apart = measured(dense, model, halves(test)[1], 500)
    # After the run that is timed: with --set compile=true a warm cache of compiled code would flatter it.
    rates = [throughput(network, dense, train, settings, few) for network in (model, dense)]
    return {
        "case": name, "source": opened.name, "method": options.method, "seed": seed,
        "params_before": sum(p.numel() for p in dense.parameters()),
        "params_after": sum(p.numel() for p in model.parameters()), "params_allowed": case.params,
        "top1_dense": report.teacher_top1, "top1_converted": report.top1_before, "top1": report.top1_after,
        "second_half": {"top1_dense": apart["top1_dense"], "top1": apart["top1"], "images": apart["images"]},
        "target": case.target, "reached": case.target is not None and (report.top1_after or 0) >= case.target,
        "epochs": report.epochs, "train_images": len(train), "settings": settings,
        "convert_seconds": None if options.start else round(convert_seconds, 1),
        "finetune_seconds": round(max(seconds, report.seconds), 1),
        "finetune_cpu_seconds": round(cpu_seconds, 1),
        "minutes_allowed": options.minutes or case.minutes,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "images_per_second": {"shared": rates[0], "dense": rates[1], "ratio": round(rates[0] / rates[1], 3)},
        "top1_by_epoch": [r["top1"] for r in report.history if "top1" in r], "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--data", required=True, help="DATA with splits train and test")
    parser.add_argument("--source", help="the dense network, for one case")
    parser.add_argument("--source-dir", type=Path, help="folder with the public weight files")
    parser.add_argument("--start", type=Path, help="the converted network, a sharefold directory, instead of converting")
    parser.add_argument("--random", action="store_true", help="random weights (to try the script)")
    parser.add_argument("--method", default="auto")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from 0")
    parser.add_argument("--epochs", type=int, help="instead of the case's")
    parser.add_argument("--minutes", type=float, help="as many epochs as fit, by the images a second of a few updates")
    parser.add_argument("--limit", type=int, help="only so many training and test images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of FinetuneConfig")
    parser.add_argument("--out", type=Path, default=RESULTS / "finetune_cifar.json")
    parser.add_argument("--run-dir", type=Path, help="keep states and logs here; an interrupted run goes on")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    options.set = settings_of(options.set)
    if not options.source and not options.source_dir:
        parser.error("give --source or --source-dir")
    return options


def settings_of(items: list[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE, values as JSON where they are such."""
    return {name: _value(value) for name, _, value in (item.partition("=") for item in items)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one group for all runs of this script
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    records = []
    for name in options.cases:
        case = CASES[name]
        for seed in range(options.seeds):
            record = measure(name, case, options.source or str(options.source_dir / case.weights), options, seed)
            records.append(record)
            if int(os.environ.get("RANK", "0")) == 0:
                print(json.dumps(record))
                write(options.out, record)
    return records


KEY = ("case", "method", "seed", "epochs", "train_images")


def write(path: Path, record: dict[str, Any], names: tuple[str, ...] = KEY) -> None:
    """Puts a record into the file, in place of an earlier one with the same values of ``names`` on the same GPU or none."""

    def key(r: dict[str, Any]) -> tuple[Any, ...]:
        return *(r[name] for name in names), r["hardware"].get("gpu")

    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    records = [r for r in old if key(r) != key(record)] + [record]
    path.write_text(json.dumps(sorted(records, key=lambda r: str(key(r))), indent=1) + "\n")


if __name__ == "__main__":
    main()
