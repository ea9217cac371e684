"""What each method costs: ResNet-20 on CIFAR-10 at equal sizes, no labels, no fine-tuning.

    export SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=1
    python benchmarks/methods_cifar.py
    python benchmarks/methods_cifar.py --network resnet56 --sizes 50% 35%

Calibration: 1,000 training images without labels (``--calib none``: procedural images, no data at all). Top-1 is of
all 10,000 test images. A method that cannot reach a size is written down with the floor it names. One record a
(network, method, size, calibration); records of earlier runs stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from cifar import WEIGHTS, data_folder, hardware, read_split

import sharefold
from sharefold.data import Preprocess
from sharefold.measure import count_parameters

RESULTS = Path(__file__).parent / "results" / "methods_cifar.json"
METHODS = (
    "average", "tied", "cluster-layer", "cluster-filter", "cluster-kernel", "basis", "hybrid", "svd", "spatial", "fold", "auto",
)  # fmt: skip


@torch.no_grad()
def correct(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, normalize: Any) -> float:
    """Share of ``images`` (n, 3, 32, 32) uint8 that the model classifies rightly."""
    hits = sum(
        int((model(normalize(x)).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(images)


def measure(source: Any, method: str, size: str, calib: str, data: dict[str, Any], seed: int) -> dict[str, Any]:
    """One conversion."""
    model = copy.deepcopy(source.model)
    before = count_parameters(model)
    calibration = data["calibration"] if calib == "train" else None
    record: dict[str, Any] = {"method": method, "size": size, "calib": calib, "seed": seed, "params_before": before}
    start = time.perf_counter()
    cal = sharefold.calibrate(model, calibration, seed=seed)
    try:
        plan = sharefold.plan(model, size, cal, method=method)
    except sharefold.SharefoldError as error:
        return {**record, "refused": str(error)}
    done = sharefold.convert_(model, plan, cal)
    seconds = time.perf_counter() - start
    after = count_parameters(model)
    codes = sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith("codes"))
    return {
        **record, "params_after": after, "kept": round(after / before, 4), "code_bytes": codes,
        "top1": correct(model, *data["test"], data["normalize"]), "agreement": done.agreement, "kl": done.kl,
        "mean_error": sum((g.error or 0) * len(g.members) for g in done.plan.groups)
        / max(1, sum(len(g.members) for g in done.plan.groups)),
        "refit_kept": done.steps["refit"]["kept"], "norms_kept": done.steps["norms"]["kept"],
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=WEIGHTS, default="resnet20")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", default=["65%", "50%"])
    parser.add_argument("--calib", choices=("train", "none"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sprites", type=int, help="only so many thousand test images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = data_folder()
    source = sharefold.open_source(str(folder / "weights" / WEIGHTS[options.network]))
    preprocess = Preprocess.from_cfg(source.pretrained_cfg)
    test_x, test_y = read_split(folder, "test", options.sprites)
    train_x, _ = read_split(folder, "train", 5)
    pick = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(options.seed))[:1000].sort().values
    data = {
        "test": (torch.from_numpy(test_x).permute(0, 3, 1, 2), torch.from_numpy(test_y.astype("int64"))),
        "calibration": preprocess.normalize(torch.from_numpy(train_x).permute(0, 3, 1, 2)[pick]),
        "normalize": preprocess.normalize,
    }
    here = hardware()

    def keep(record: dict[str, Any]) -> None:
        write(options.out, {"network": options.network, **record, "images": len(test_x), "hardware": here})

    keep({"method": "original", "size": "100%", "calib": "none", "params_after": count_parameters(source.model),
          "top1": correct(source.model, *data["test"], preprocess.normalize)})  # fmt: skip
    for size in options.sizes:
        for method in options.methods:
            record = measure(source, method, size, options.calib, data, options.seed)
            print(json.dumps(record), flush=True)
            keep(record)


def write(path: Path, new: dict[str, Any]) -> None:
    """Puts a record into the file, in place of an earlier one of the same setting."""

    def key(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["network"], record["calib"], record["size"], record["method"]

    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text()) if path.exists() else []
    records = [record for record in old if key(record) != key(new)] + [new]
    path.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
