"""Smaller without labels: sharefold and what a user would pick instead, on the same images, in one run.

    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2 python benchmarks/label_free.py --seeds 0 1 2 --methods auto --refine 20
    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2 python benchmarks/label_free.py --networks resnet20 --sizes 50% 0.15MB

Rows of one network and seed share the 2,000 calibration images (`--images 0`: none, procedural ones stand in); top-1 is of
all 10,000 test images. A size in MB is that of the whole file, which is written and read back; only sharefold is asked for
those.

    original        the network as it is
    auto, basis     sharefold
    svd             data-norm low rank per layer, as BALF (arXiv:2509.25136)
    spatial         column and row filters per layer, as AIMET's spatial SVD (arXiv:1405.3866)
    average         the mean kernel of each group
    pruning         magnitude channel pruning by torch-pruning, where it is installed and runs
    quantize-B      round to nearest at B bits, a scale per row (of least squared error, not sharefold's files), dense network;
                    its size is in bytes

Writes results/label_free.json, .csv and .png; rows of earlier runs stay unless they are measured again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cifar import WEIGHTS, data_folder, hardware, read_split
from methods_cifar import correct
from torch import nn

import sharefold
from sharefold.budget import parse_budget, parse_effort
from sharefold.calibration.images import procedural_images
from sharefold.data import Preprocess
from sharefold.measure import count_macs, count_parameters, model_bytes
from sharefold.solvers.grid import search_scale

RESULTS = Path(__file__).parent / "results"
METHODS = ("original", "auto", "basis", "svd", "spatial", "average", "pruning", "quantize-4", "quantize-3")
SIZES = {
    "resnet20": ("65%", "50%", "35%", "25%", "0.15MB", "0.11MB"), "resnet56": ("50%", "35%", "25%", "0.43MB", "0.33MB", "0.22MB"),
}  # fmt: skip


def rounded(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest values (O, N) of symmetric integers times the row scale of least squared error."""
    exact, top = matrix.double(), 2 ** (bits - 1) - 1
    scale = search_scale(exact, bits).unsqueeze(1)
    return scale.float() * (exact / scale).round().clamp(-top, top).float()


def quantized(model: nn.Module, bits: int) -> dict[str, Any]:
    """Rounds every convolution and Linear of ``model`` in place; bytes are codes, 2 a row scale, 4 anything else."""
    size = float(model_bytes(model))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.data
            weight.copy_(rounded(weight.flatten(1), bits).view_as(weight))
            size += weight.numel() * (bits / 8 - 4) + 2 * len(weight)
    return {"bytes": int(size)}


def pruned(model: nn.Module, size: float, example: torch.Tensor) -> dict[str, Any]:
    """Prunes channels by magnitude, the same share everywhere, to at most ``size`` of the parameters."""
    import torch_pruning

    before, low, high, found = count_parameters(model), 0.0, 0.95, None
    for _ in range(8):
        ratio, trial = (low + high) / 2, copy.deepcopy(model)
        pruner = torch_pruning.pruner.MagnitudePruner(
            trial, example, torch_pruning.importance.MagnitudeImportance(), pruning_ratio=ratio,
            ignored_layers=[m for m in trial.modules() if isinstance(m, nn.Linear)],
        )  # fmt: skip
        pruner.step()
        trial(example)
        if count_parameters(trial) <= size * before:
            high, found = ratio, trial
        else:
            low = ratio
    if found is None:
        raise RuntimeError("no ratio reaches the size")
    return {"model": found}


def converted(
    model: nn.Module, method: str, size: str, refine: str, data: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """sharefold's rows: one plan, carried out as it is and, with ``refine``, refined."""
    start = time.perf_counter()
    cal = sharefold.calibrate(model, data["calibration"], seed=seed)
    plan = sharefold.plan(model, size, cal, method=method)
    planned = time.perf_counter() - start
    for effort in ["", refine] if refine and (plan.groups or plan.store) else [""]:  # nothing changed, nothing refined
        cal.forget_solutions()  # both rows' seconds are those of a first conversion
        start, trial = time.perf_counter(), copy.deepcopy(model)
        done = sharefold.convert_(trial, plan, cal, refine=effort or None)
        row = {"refine": effort, "agreement": done.agreement, "kl": done.kl, "seconds_by_step": done.seconds}
        row["seconds"] = round(planned + time.perf_counter() - start, 1)
        yield finished(row, trial, size, data)


def finished(row: dict[str, Any], model: nn.Module, size: str, data: dict[str, Any]) -> dict[str, Any]:
    """``row`` with size and accuracy of ``model``; of a file where the size is one in bytes."""
    if parse_budget(size).unit == "bytes":
        row["bytes"], model = written(model)
    else:
        row["bytes"] = model_bytes(model)
    return {**row, **measured(model, data), "date": time.strftime("%Y-%m-%d")}


def written(model: nn.Module) -> tuple[int, nn.Module]:
    """Bytes of the whole file, and the network that is read back from it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.safetensors"
        sharefold.save(model, path)
        return path.stat().st_size, sharefold.load(path)


def measured(model: nn.Module, data: dict[str, Any]) -> dict[str, Any]:
    macs = count_macs(model, data["normalize"](data["test"][0][:1]))
    return {"parameters": count_parameters(model), "macs": macs, "top1": correct(model, *data["test"], data["normalize"])}


def measure(
    model: nn.Module, method: str, size: str, refine: str, data: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of one method at one size."""
    head = {"method": method, "size": size, "seed": seed}
    try:
        if method.startswith("quantize-") or method in ("original", "pruning"):
            start, row = time.perf_counter(), {"refine": ""}
            model = copy.deepcopy(model)
            if method == "pruning":
                model = pruned(model, float(size.rstrip("%")) / 100, data["normalize"](data["test"][0][:1]))["model"]
            elif method != "original":
                row.update(quantized(model, int(method.partition("-")[2])))
            row = {**head, **row, "seconds": round(time.perf_counter() - start, 1), **measured(model, data)}
            yield {"bytes": model_bytes(model), **row}
        else:
            for row in converted(model, method, size, refine, data, seed):
                yield {**head, **row}
    except Exception as error:  # a rival that does not run is a result
        yield {**head, "refine": refine, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def load(network: str, seed: int, count: int) -> tuple[nn.Module, dict[str, Any]]:
    """The public network and its images."""
    folder = data_folder()
    source = sharefold.open_source(str(folder / "weights" / WEIGHTS[network]))
    preprocess = Preprocess.from_cfg(source.pretrained_cfg)
    test_x, test_y = read_split(folder, "test")
    train_x, _ = read_split(folder, "train")
    pick = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    images = torch.from_numpy(train_x[pick.numpy()]).permute(0, 3, 1, 2)
    return source.model, {
        "test": (torch.from_numpy(test_x).permute(0, 3, 1, 2), torch.from_numpy(test_y.astype("int64"))),
        "calibration": preprocess.normalize(images) if count else procedural_images(source.model, seed=seed),
        "normalize": preprocess.normalize,
    }


# What is drawn, in the order of the legend: colour, line.
SERIES = {
    "original": ("black", ""), "sharefold": ("tab:orange", "-"), "sharefold, refined": ("tab:green", "-"),
    "sharefold, no images": ("tab:orange", ":"), "sharefold, refined, no images": ("tab:green", ":"),
    "sharefold, file of that size": ("tab:red", "-"),
    "sharefold, file of that size, refined": ("tab:green", "--"), "low rank": ("tab:purple", "--"), "basis": ("tab:olive", "--"),
    "spatial": ("tab:cyan", "--"), "average": ("tab:brown", "--"), "pruning": ("tab:pink", "--"),
    "original, rounded to nearest": ("tab:blue", "--"),
}  # fmt: skip


def series_of(row: dict[str, Any]) -> str:
    if row["method"] == "auto":
        if row["size"].endswith("B"):
            return "sharefold, file of that size" + (", refined" if row["refine"] else "")
        return "sharefold" + (", refined" if row["refine"] else "") + ("" if row["images"] else ", no images")
    if row["method"].startswith("quantize"):
        return "original, rounded to nearest"
    return {"svd": "low rank"}.get(row["method"], row["method"])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against size in bytes, one panel a network, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = sorted({row["network"] for row in rows})
    figure, axes = pyplot.subplots(1, len(networks), figsize=(5.5 * len(networks), 4.6), squeeze=False)
    drawn: dict[str, Any] = {}
    for axis, network in zip(axes[0], networks, strict=True):
        series: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for row in rows:
            if row["network"] == network and "top1" in row:
                points = series.setdefault(series_of(row), {})
                points.setdefault(row["method"] + row["size"], []).append((row["bytes"] / 1e6, 100 * row["top1"]))
        for label, (color, line) in SERIES.items():
            if label in series:
                mean = sorted(tuple(statistics.mean(v) for v in zip(*p, strict=True)) for p in series[label].values())
                marker = "o" if line else "*"
                drawn[label] = axis.plot(*zip(*mean, strict=True), color=color, ls=line, marker=marker, ms=5 if line else 11)[0]
        axis.set(title=network.replace("resnet", "ResNet-") + " on CIFAR-10", xlabel="size, MB", ylabel="top-1, %", xscale="log")
        axis.set_ylim(bottom=max(60, axis.get_ylim()[0]))
        axis.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5) if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(alpha=0.3)
    names = [label for label in SERIES if label in drawn]
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.legend([drawn[n] for n in names], names, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def write(rows: list[dict[str, Any]], out: Path) -> None:
    """The rows as .csv and .png beside ``out``.json."""
    fields = ["network", "method", "size", "refine", "seed", "images", "parameters", "macs", "bytes", "top1", "seconds", "failed"]
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", help="default: by network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=2000, help="0: none at all, procedural ones stand in")
    parser.add_argument("--refine", help="also measure auto after refinement: epochs, a time (4m) or auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "label_free")
    options = parser.parse_args()
    target = options.out.with_suffix(".json")
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    for network in options.networks:
        for seed in options.seeds:
            model, data = load(network, seed, options.images)
            for method in options.methods:
                sizes = options.sizes or SIZES[network]
                if method == "original" or method.startswith("quantize"):
                    sizes = [""]
                elif method != "auto":
                    sizes = [size for size in sizes if size.endswith("%")]
                for size in sizes:
                    refine = options.refine if method == "auto" and parse_effort(options.refine) else ""
                    for row in measure(model, method, size, refine, data, seed):
                        row = {"network": network, **row, "images": options.images}
                        key = ("network", "method", "size", "seed", "images")
                        others = [r for r in rows if any(r[k] != row[k] for k in key) or bool(r["refine"]) != bool(row["refine"])]
                        rows = [*others, row]  # however long it is refined, the newest of these is the one that counts
                        shown = row.get("failed") or " ".join(str(row[k]) for k in ("top1", "parameters", "bytes", "seconds"))
                        print(network, seed, method, size, row["refine"], shown, flush=True)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")
    write(rows, options.out)


if __name__ == "__main__":
    main()
