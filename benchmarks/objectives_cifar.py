"""What a plan should keep small: every objective of the planner on the same networks, sizes and images.

    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2 python benchmarks/objectives_cifar.py
    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2 python benchmarks/objectives_cifar.py --networks resnet20 --sizes 35%

Straight after conversion, repairs included: top-1 on all 10,000 test images, and KL(original || converted) on the first
2,000 of them, which tells neighbours apart where top-1 is noise. Writes results/objectives_cifar.json after every row;
rows of earlier runs stay unless they are measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from cifar import WEIGHTS, hardware
from label_free import SIZES, load
from methods_cifar import correct

import sharefold
from sharefold.graph import analyze
from sharefold.measure import agreement
from sharefold.options import PlanOptions
from sharefold.planner import OBJECTIVES, Planner

RESULTS = Path(__file__).parent / "results" / "objectives_cifar.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--sizes", nargs="+", help="default: by network")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for network in options.networks:
        for seed in range(options.seeds):
            model, data = load(network, seed, options.images)
            images = data["calibration"]
            graph = analyze(model, images[:1])
            test = data["normalize"](data["test"][0][:2000])
            for objective in options.objectives:
                cal = sharefold.calibrate(model, images, graph=graph, seed=seed)
                planner = Planner(cal, PlanOptions(objective=objective))
                for size in options.sizes or [size for size in SIZES[network] if size.endswith("%")]:
                    start, converted = time.perf_counter(), copy.deepcopy(model)
                    plan = planner.plan(size)
                    planned = time.perf_counter() - start
                    done = sharefold.convert_(converted, plan, cal)
                    row = {
                        "network": network, "objective": objective, "size": size, "seed": seed, "images": options.images,
                        "top1": correct(converted, *data["test"], data["normalize"]),
                        "kl_test": agreement(model, converted, test).kl, "kl_held_out": done.kl,
                        "plan_seconds": round(planned, 1), "seconds": round(time.perf_counter() - start, 1),
                    }  # fmt: skip
                    key = ("network", "objective", "size", "seed", "images")
                    rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
                    figures = f"{row['top1']:.4f} {row['kl_test']:.4f} {row['plan_seconds']} s"
                    print(network, seed, objective, size, figures, flush=True)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
