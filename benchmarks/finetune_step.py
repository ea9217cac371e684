"""Images a second of fine-tuning updates of a converted network and of the dense one, without the reading of images.

    python benchmarks/finetune_step.py resnet56-319k --source resnet56.th --start converted --batch 256 512 1024
    python benchmarks/finetune_step.py resnet56-319k --source resnet56.th --start converted --batch 512 --compile

The images are random and stay on the device; the first updates, in which libraries load, graphs are recorded and code is
compiled, are timed apart. ``--kernels FILE`` writes where a GPU spends the time of an update of the converted network.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finetune_cifar
import torch
from torch import Tensor, nn

import sharefold
from sharefold.finetune.config import FinetuneConfig
from sharefold.finetune.distributed import world
from sharefold.finetune.schedule import build_optimizer
from sharefold.finetune.step import Updater
from sharefold.finetune.whole import whole_factors
from sharefold.sources import open_source

WARM_UP = 5


def waited(device: torch.device) -> float:
    """Now, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield images, labels


def measured(model: nn.Module, teacher: nn.Module, config: FinetuneConfig, updates: int, kernels: Path | None) -> dict[str, Any]:
    """Of a copy of ``model``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(0, 10, (config.batch_size,), generator=generator)
    with world(config.device) as where, whole_factors(model):
        for network in (model, teacher):
            network.to(where.device, memory_format=torch.channels_last)
        if where.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(where.device)
        stream = batches(images.to(where.device), labels.to(where.device))
        updater = Updater(model, teacher.eval(), build_optimizer(model, config), config, where, next(stream)[0])
        start = waited(where.device)
        with updater.watching():
            model.train()
            for _ in range(WARM_UP):
                updater.update(stream)
            ready = waited(where.device)
            for _ in range(updates):
                loss = updater.update(stream)["loss"]
            seconds = (waited(where.device) - ready) / updates
            if kernels is not None:
                write_kernels(kernels, updater, stream)
        peak = torch.cuda.max_memory_allocated(where.device) if where.device.type == "cuda" else None
    return {"images_per_second": round(config.batch_size / seconds, 1), "first_updates_seconds": round(ready - start, 1),
            "loss": float(loss), "peak_bytes": peak}  # fmt: skip


def write_kernels(path: Path, updater: Updater, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
    """Three updates' kernels, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as found:
        for _ in range(3):
            updater.update(stream)
    order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    path.write_text(found.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=110))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=finetune_cifar.CASES)
    parser.add_argument("--source", required=True, help="the dense network")
    parser.add_argument("--start", type=Path, required=True, help="the converted network, a sharefold directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kernels", type=Path)
    parser.add_argument("--out", type=Path, default=finetune_cifar.RESULTS / "finetune_step.json")
    options = parser.parse_args()
    dense, shared = open_source(options.source).model, sharefold.load(options.start)
    for batch in options.batch:
        for kind, network in (("dense", dense), ("shared", shared)):
            config = FinetuneConfig(batch_size=batch, device=options.device, compile=options.compile)
            kernels = options.kernels if kind == "shared" else None
            found = measured(network, copy.deepcopy(dense), config, options.updates, kernels)
            record = {
                "case": options.case, "network": kind, "batch": batch, "compile": options.compile, **found,
                "hardware": finetune_cifar.hardware(), "date": time.strftime("%Y-%m-%d"),
            }  # fmt: skip
            print(json.dumps(record), flush=True)
            finetune_cifar.write(options.out, record, ("case", "network", "batch", "compile"))


if __name__ == "__main__":
    main()
