"""Conversion and run time on a GPU: seconds of every phase, accuracy beside the CPU's, latency and memory against dense.

    python benchmarks/gpu.py convert resnet56 --weights resnet56.th --data cifar10.npz --budget 50% --out convert.json
    python benchmarks/gpu.py convert lite0 --weights lite0.safetensors --data imagenet.npz --budget 80% --out convert.json
    python benchmarks/gpu.py latency resnet56 --weights resnet56.th --data cifar10.npz --network converted --out latency.json

A data file holds ``train_x`` (calibration, no label of it is read) and ``test_x``, ``test_y``, uint8 (n, H, W, 3). ``convert``
converts twice and reports the second time, since the first one also loads libraries; ``--save`` keeps the network. ``latency``
times the dense network and one so kept in turns, in float32 and bf16, batch 1 and 256. ``accuracy`` measures one that was kept,
on any machine. ``benchmarks/gpu.sh`` runs all of it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from finetune_cifar import hardware
from measuring import measured
from torch import Tensor, nn

import sharefold
from sharefold.bench import race
from sharefold.data import Preprocess, calibration_images, open_data
from sharefold.finetune.distributed import pick_device
from sharefold.layers import shared_layers
from sharefold.measure import count_macs, count_parameters

ARCHITECTURES = {
    "resnet20": "resnet20_cifar", "resnet56": "resnet56_cifar", "lite0": "timm:tf_efficientnet_lite0",
}  # fmt: skip


def seconds(device: torch.device) -> float:
    """Now, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def convert(network: nn.Module, images: Tensor, options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, Any, Any]:
    """A converted copy, what the conversion says, seconds of its phases."""
    model = copy.deepcopy(network)
    times = [seconds(device)]
    cal = sharefold.calibrate(model, images, seed=options.seed)
    times.append(seconds(device))
    plan = sharefold.plan(model, options.budget, cal)
    times.append(seconds(device))
    done = sharefold.convert_(model, plan, cal)
    times.append(seconds(device))
    names = ("calibrate", "plan", "convert")
    phases = {name: round(b - a, 2) for name, a, b in zip(names, times, times[1:], strict=False)}
    return model, done, {**phases, "whole": round(times[-1] - times[0], 2)}


def latency(network: nn.Module, model: nn.Module, images: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch and precision: milliseconds dense, converted (each layer in the form that ``auto`` picks) and with all
    layers composed, the ratios to dense, and peak memory of a pass."""
    device, rows = images.device, []
    composed = copy.deepcopy(model)
    for layer in shared_layers(composed).values():
        layer.runtime = "composed"
    contestants = {"dense": network, "converted": model, "composed": composed}
    for batch in options.batch:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = images[:1].expand(batch, -1, -1, -1).to(dtype).contiguous(memory_format=torch.channels_last)
            ready = {k: copy.deepcopy(m).to(dtype).to(memory_format=torch.channels_last).eval() for k, m in contestants.items()}
            with torch.inference_mode():
                runs = {name: functools.partial(m, inputs) for name, m in ready.items()}
                times = race(runs, options.repeats, device)
                memory = {name: peak(m, inputs) for name, m in ready.items()}
            rows.append({
                "batch": batch, "dtype": str(dtype).removeprefix("torch."),
                **{f"{name}_ms": round(1e3 * t.median, 3) for name, t in times.items()},
                **{f"{name}_ratio": round(t.ratio, 3) for name, t in times.items() if name != "dense"},
                **{f"{name}_peak_bytes": n for name, n in memory.items()},
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def peak(model: nn.Module, inputs: Tensor) -> int | None:
    """Bytes allocated at most during one pass, beyond what lay there before; None off the GPU."""
    if inputs.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(inputs.device)
    torch.cuda.reset_peak_memory_stats(inputs.device)
    model(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(inputs.device) - before


def peak_of(device: torch.device) -> int | None:
    """Bytes allocated at most so far; None off the GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds a record to a JSON list, at once: a run that is cut off keeps what it found."""
    known = json.loads(path.read_text()) if path.exists() else []
    path.write_text(json.dumps([*known, record], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["convert", "latency", "accuracy"])
    parser.add_argument("network_name", metavar="NETWORK", choices=ARCHITECTURES)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--count", type=int, default=1000, help="calibration images")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--times", type=int, default=2, help="how often it is converted; the last time counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--save", type=Path, help="convert: where the converted network goes")
    parser.add_argument("--network", type=Path, help="latency, accuracy: a converted network that was saved")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if (options.what == "convert") == bool(options.network):
        parser.error("--network DIRECTORY belongs to latency and accuracy, which need it")
    device = pick_device(options.device)
    source = sharefold.open_source(options.weights, arch=ARCHITECTURES[options.network_name])
    preprocess = Preprocess.from_cfg(source.pretrained_cfg)
    network = source.model.eval().to(device)
    images = calibration_images(f"npz:{options.data}", preprocess, options.count, options.seed, "train")
    found: dict[str, Any] = {}
    if options.network:
        model = sharefold.load(options.network).eval().to(device)
    else:
        for _ in range(options.times):
            model, done, phases = convert(network, images, options, device)
            print(phases, flush=True)
        found = {"seconds": phases, "said_agreement": done.agreement, "peak_bytes": peak_of(device)}
        if options.save:
            sharefold.save(model, options.save, force=True)
    if options.what == "latency":
        example = images[:1].to(device)
        found = {"macs_kept": count_macs(model, example) / count_macs(network, example)}
        found["rows"] = latency(network, model, example, options)
    else:
        found |= measured(network, model, open_data(f"npz:{options.data}", "test", transform_cfg=preprocess), 250)
    record = {
        "what": options.what, "network": options.network_name, "budget": options.budget, "seed": options.seed,
        "kept": count_parameters(model) / count_parameters(network), **found, "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    append(options.out, record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
