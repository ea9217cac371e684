"""Small files: sharefold's budgets in bytes beside NNCodec, the codec of ISO/IEC 15938-17, which needs no images.

    export SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=1
    python benchmarks/label_free.py --methods auto --sizes 0.08MB 0.06MB 0.05MB 0.04MB --networks resnet20 --seeds 0 1 2
    python benchmarks/bytes.py --nncodec nncodec-env/bin/python

``nncodec`` (2.1.3) wants numpy below 2, so it runs in an environment of its own: ``python -m venv nncodec-env`` and
``nncodec-env/bin/pip install nncodec``. It codes the state dict of the dense network with dependent quantisation at some
quantisation parameters, all else by default; what it decodes is measured on all 10,000 test images. sharefold's own points are
the rows of ``results/label_free.json`` whose sizes are in bytes, the means over their seeds. Between two points accuracy is
taken to be linear in the logarithm of the size. Writes ``results/bytes.json`` and ``results/bytes.png``.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar import WEIGHTS, hardware
from label_free import load
from methods_cifar import correct
from torch import nn

RESULTS = Path(__file__).parent / "results"
# Quantisation parameters: the file shrinks as they rise.
STEPS = (-28, -26, -24, -22, -20, -18, -16)


def coded(model: nn.Module, python: str, steps: Sequence[int] = STEPS) -> tuple[str, dict[int, tuple[int, nn.Module]]]:
    """NNCodec's version, and by quantisation parameter the bytes and the network that comes back."""
    floats = {name: tensor.numpy() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "weights.npz"
        np.savez(source, **floats)
        words = [python, str(Path(__file__).parent / "nncodec_code.py"), str(source), folder, *map(str, steps)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
        told = json.loads(done.stdout.splitlines()[-1])
        for step in steps:
            network = copy.deepcopy(model)
            with np.load(Path(folder) / f"{step}.npz") as arrays:
                network.load_state_dict({name: torch.from_numpy(arrays[name]) for name in floats}, strict=False)
            found[step] = told["found"][str(step)]["bytes"], network.eval()
    return told["version"], found


def own_curve(network: str) -> list[tuple[float, float]]:
    """(bytes, top-1) of sharefold's files, rising: the mean over seeds at each size that was asked for."""
    rows = json.loads((RESULTS / "label_free.json").read_text())["rows"]
    sizes: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ours = row["network"] == network and row["method"] == "auto" and row["images"] and not row["refine"]
        if ours and row["size"].endswith("B"):
            sizes.setdefault(row["size"], []).append(row)
    points = [(statistics.mean(r["bytes"] for r in found), statistics.mean(r["top1"] for r in found)) for found in sizes.values()]
    return sorted(points)


def bytes_at(curve: Sequence[tuple[float, float]], top1: float) -> float | None:
    """The size at which ``curve`` first reaches ``top1``; None outside of it."""
    for (small, low), (large, high) in zip(curve, curve[1:], strict=False):
        if low <= top1 <= high:
            share = (top1 - low) / (high - low) if high > low else 0.0
            return math.exp(math.log(small) + share * (math.log(large) - math.log(small)))
    return None


def draw(rows: Sequence[dict[str, Any]], curves: dict[str, list[tuple[float, float]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.4), squeeze=False)
    for axis, (network, curve) in zip(axes[0], curves.items(), strict=True):
        theirs = sorted((row["bytes"], row["top1"]) for row in rows if row["network"] == network)
        for points, colour, label in ((curve, "tab:red", "sharefold"), (theirs, "tab:blue", "NNCodec")):
            sizes, found = [size / 1e3 for size, _ in points], [100 * top1 for _, top1 in points]
            axis.plot(sizes, found, "o-", color=colour, label=label, ms=4)
        best = 100 * max(top1 for _, top1 in (*curve, *theirs))
        axis.set(xlabel="whole file [kB]", ylabel="top-1 [%]", title=network.replace("resnet", "ResNet-"))
        axis.set_ylim(best - 8, best + 0.6)
        axis.set_xscale("log")
        ticks = [size for size in (30, 40, 60, 80, 110, 150, 220, 330, 430) if min(curve[0][0], theirs[0][0]) <= 1e3 * size * 1.1]
        axis.set_xticks(ticks, [str(size) for size in ticks])
        axis.minorticks_off()
        axis.set_xlim(0.9 * min(curve[0][0], theirs[0][0]) / 1e3, 1.1 * max(curve[-1][0], theirs[-1][0]) / 1e3)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nncodec", help="python of an environment with nncodec; without it the rows of earlier runs stay")
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    options = parser.parse_args()
    out = RESULTS / "bytes.json"
    rows = json.loads(out.read_text())["rows"] if out.exists() else []
    for network in options.networks if options.nncodec else ():
        model, data = load(network, 0, 1)
        version, found = coded(model, options.nncodec)
        rows = [row for row in rows if row["network"] != network]
        for step, (size, decoded) in found.items():
            top1 = correct(decoded, *data["test"], data["normalize"])
            rows.append({
                "network": network, "codec": f"nncodec {version}", "qp": step, "bytes": size, "top1": top1,
                "date": time.strftime("%Y-%m-%d"), "hardware": hardware(),
            })  # fmt: skip
            print(network, step, size, f"{top1:.4f}", flush=True)
    curves = {network: own_curve(network) for network in dict.fromkeys(row["network"] for row in rows)}
    for row in rows:
        row["sharefold_bytes"] = bytes_at(curves[row["network"]], row["top1"])
    out.write_text(json.dumps({"rows": rows, "curves": curves}, indent=1) + "\n")
    draw(rows, curves, RESULTS / "bytes.png")


if __name__ == "__main__":
    main()
