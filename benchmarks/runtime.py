"""At which share of the multiplications two small convolutions beat one: the constant behind `runtime = "auto"`.

    python benchmarks/runtime.py --threads 1 --batch 1 --batch 16
    python benchmarks/runtime.py --device cuda --batch 64

Layers of the shapes that ResNets have are built at several ranks, as shared basis and as column and row filters; each
runs factored and composed (weight kept) in turns on one random input. Prints a table and writes
results/runtime.json; results of other devices in that file stay. ``regret`` says, for every threshold, how much longer
a layer takes under `auto` than in its better form, mean over the layers; ``threshold`` is where that is least.
``by_share`` says how often the factored form wins at which share.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharefold.bench import race
from sharefold.layers import BasisConv, ConvForm, SharedConv, SpatialConv
from sharefold.layers.shared_conv import FACTORED_SHARE
from sharefold.running import evaluating

RESULTS = Path(__file__).parent / "results" / "runtime.json"
# (channels in, channels out, kernel, stride, size of the input map): stages of ResNet-18/50 and of CIFAR ResNets.
SHAPES = (
    (64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7), (128, 256, 3, 2, 28),
    (256, 64, 1, 1, 56), (1024, 256, 1, 1, 14), (512, 2048, 1, 1, 7), (16, 16, 3, 1, 32), (64, 64, 3, 1, 8),
)  # fmt: skip
SHARES = (0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def layers(form: ConvForm, share: float) -> dict[str, SharedConv]:
    """A basis layer and, for windows, a column-and-row layer whose multiplications are about ``share`` of the dense."""
    rows, features = form.out_channels, form.features
    rank = max(1, round(share * rows * features / (rows + features)))
    found: dict[str, SharedConv] = {
        "basis": BasisConv(form, torch.randn(rows, rank), unique=torch.randn(rank, *form.weight_shape[1:]))
    }
    height, width = form.kernel_size
    if height > 1:
        cost = form.in_channels * height * form.stride[1] + rows * width
        rank = max(1, round(share * rows * features / cost))
        inputs = form.in_channels
        found["spatial"] = SpatialConv(form, torch.randn(rank, inputs, height, 1), torch.randn(rows, rank, 1, width))
    return found


def measure(batch: int, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for inputs, outputs, kernel, stride, size in SHAPES:
        pad = kernel // 2
        form = ConvForm("conv2d", inputs, outputs, (kernel, kernel), (stride, stride), (pad, pad))
        images = torch.randn(batch, inputs, size, size, device=device)
        for share in SHARES:
            for kind, layer in layers(form, share).items():
                row = {"shape": form_text(form, size), "kind": kind, "batch": batch}
                rows.append(row | timed(layer.to(device), images, repeats))
                print(f"{rows[-1]['shape']:24} {kind:8} batch {batch:3}  share {rows[-1]['share']:.2f}  "
                      f"factored / composed {rows[-1]['ratio']:.2f}", flush=True)  # fmt: skip
    return rows


def timed(layer: SharedConv, images: Tensor, repeats: int) -> dict[str, Any]:
    def run(form: str) -> Tensor:
        layer.runtime = form
        return layer(images)

    with evaluating(layer):
        times = race({form: (lambda form=form: run(form)) for form in ("composed", "factored")}, repeats, images.device)
    return {"share": round(layer.factored_share(), 4), "ratio": round(times["factored"].ratio, 4)}


def form_text(form: ConvForm, size: int) -> str:
    kernel, stride = form.kernel_size[0], form.stride[0]
    return f"{form.in_channels}-{form.out_channels} {kernel}x{kernel}/{stride} at {size}"


def regret(rows: list[dict[str, Any]], threshold: float) -> float:
    """Mean of the time under ``threshold`` over the better form's, minus 1."""
    return sum(
        (row["ratio"] if row["share"] <= threshold else 1.0) / min(row["ratio"], 1.0) - 1 for row in rows
    ) / len(rows)  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    candidates = [round(0.05 * index, 2) for index in range(1, 23)]
    best = min(candidates, key=lambda threshold: regret(rows, threshold))
    by_share = {}
    for low in (0.0, 0.2, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95):
        high = {0.0: 0.2, 0.2: 0.35}.get(low, low + 0.1)
        ratios = sorted(row["ratio"] for row in rows if low <= row["share"] < high)
        if ratios:
            by_share[f"{low:.2f} to {high:.2f}"] = {
                "median_ratio": ratios[len(ratios) // 2], "factored_wins": sum(r < 1 for r in ratios) / len(ratios),
                "layers": len(ratios),
            }  # fmt: skip
    return {
        "threshold": best, "regret": {f"{t:.2f}": round(regret(rows, t), 4) for t in candidates},
        "constant": FACTORED_SHARE, "by_share": by_share,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, action="append", help="may be given several times (default 1 and 16)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    rows = [row for batch in options.batch or [1, 16] for row in measure(batch, device, options.repeats)]
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    key = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {options.threads} threads"
    parts: dict[str, Any] = {"all": summary(rows)}
    for kind in ("basis", "spatial"):
        parts[kind] = summary([row for row in rows if row["kind"] == kind])
    known[key] = {"machine": platform.machine(), "torch": torch.__version__, **parts, "layers": rows}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(known, indent=1) + "\n")
    for name, part in parts.items():
        print(f"{name}: threshold {part['threshold']}, regret {part['regret'][format(part['threshold'], '.2f')]:.3f}, "
              f"at the constant {FACTORED_SHARE}: {part['regret'][format(FACTORED_SHARE, '.2f')]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
