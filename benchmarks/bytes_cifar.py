"""Small files without labels: budgets in bytes, each share of the parameters for itself, and plain quantisation.

    export SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2
    python benchmarks/bytes_cifar.py                                 # the budgets of BUDGETS, seed 0
    python benchmarks/bytes_cifar.py --seeds 3 --networks resnet56
    python benchmarks/bytes_cifar.py --shares 1.0 0.75 0.5           # what the choice of `auto` is made from

Size is that of the whole ``.safetensors`` file, written, read back and measured on all test images. ``auto`` is
``--budget SIZE``; a share converts to so many of the parameters first and then rounds to the size. ``nearest-B`` rounds
the dense network at B bits with a scale per row; its size is counted, codes plus scales plus 32-bit norms and biases.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cifar import WEIGHTS, hardware
from label_free import load, quantized, written
from methods_cifar import correct
from torch import nn

import sharefold
from sharefold.plans import Plan

RESULTS = Path(__file__).parent / "results" / "bytes_cifar.json"
BUDGETS = {"resnet20": (150_000, 110_000), "resnet56": (430_000, 330_000, 220_000)}
BITS = (4, 3)


def converted(model: nn.Module, size: int, share: float | None, refine: str | None, data: dict[str, Any], seed: int) -> dict:
    """One file of at most ``size`` bytes; ``share`` None lets sharefold decide."""
    model = copy.deepcopy(model)
    before = sum(p.numel() for p in model.parameters())
    start = time.perf_counter()
    cal = sharefold.calibrate(model, data["calibration"], seed=seed)
    if share is None:
        plan = sharefold.plan(model, f"{size}B", cal)
    else:
        empty = Plan([], before, before)
        plan = empty if share == 1 else sharefold.plan(model, share, cal)
        plan = replace(plan, store=f"mixed:{size}B")
    done = sharefold.convert_(model, plan, cal, refine=refine)
    seconds = time.perf_counter() - start
    size, model = written(model)
    return {
        "bytes": size, "share": round(done.plan.size, 4), "kl": done.kl, "seconds": round(seconds, 1),
        "top1": correct(model, *data["test"], data["normalize"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--sizes", nargs="+", type=int, help="bytes; default: by network")
    parser.add_argument("--shares", nargs="*", type=float, default=[], help="shares of the parameters to force as well")
    parser.add_argument("--refine", help="epochs, a time (4m) or auto, before rounding")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    records = json.loads(options.out.read_text()) if options.out.exists() else []

    def note(record: dict[str, Any]) -> None:
        keys = ("network", "method", "budget", "seed", "refine")
        records[:] = [r for r in records if any(r[k] != record[k] for k in keys)] + [record]
        print(record["network"], record["method"], record["bytes"], f"{record['top1']:.4f}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(records, indent=1) + "\n")

    for network in options.networks:
        for seed in range(options.seeds):
            model, data = load(network, seed, options.images)
            fixed = {"network": network, "seed": seed, "refine": options.refine or "", "hardware": hardware()}
            for bits in BITS if seed == 0 else ():
                plain = copy.deepcopy(model)
                size = quantized(plain, bits)["bytes"]
                top1 = correct(plain, *data["test"], data["normalize"])
                note({**fixed, "refine": "", "method": f"nearest-{bits}", "budget": None, "bytes": size, "top1": top1})
            for size in options.sizes or BUDGETS[network]:
                for share in (None, *options.shares):
                    method = "auto" if share is None else f"{share:.0%} of the parameters"
                    found = converted(model, size, share, options.refine, data, seed)
                    note({**fixed, "method": method, "budget": size, **found})


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
