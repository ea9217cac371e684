"""Forms of sharing at the same number of parameters: what each leaves of the outputs of a stage's 3x3 convolutions.

    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=1 python benchmarks/forms.py

For every group of CIFAR's ResNet-20 and ResNet-56 and every share of its parameters: the largest basis, the largest spatial low
rank, and hybrids whose own filters take a quarter, a half and three quarters, all with pivots, all fitted to the same moments of
the same images. Nothing is allocated, repaired or refitted. Writes results/forms.json.
"""

from __future__ import annotations

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cifar import WEIGHTS, hardware
from label_free import load

import sharefold
from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.graph import find_groups
from sharefold.methods import METHODS
from sharefold.methods.hybrid import Hybrid

SIZES = (0.5, 0.35, 0.2)
SHARES = (0.25, 0.5, 0.75)


def most(limit: int, cost: float, price: Callable[[int], float]) -> int:
    """The largest count up to ``limit`` whose price is at most ``cost``; at least 1."""
    return max(1, bisect_right(range(1, limit + 1), cost, key=price))


def settings(problem: GroupProblem, cost: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Methods with their options, each as large as ``cost`` allows."""
    forms = problem.forms
    for name in ("basis", "spatial"):
        limit = min(METHODS[name].columns(forms) - 1, METHODS[name].largest(forms)["rank"])  # type: ignore[attr-defined]
        yield name, {"rank": most(limit, cost, lambda r: _cost(name, problem, rank=r)), "pivoted": True}  # noqa: B023
    hybrid = METHODS["hybrid"]
    assert isinstance(hybrid, Hybrid)
    for share in SHARES:
        rank, own = hybrid.split(forms, cost, share)
        yield f"hybrid, {share:.0%} own", {"rank": rank, "own": own, "pivoted": True}


def _cost(name: str, problem: GroupProblem, **options: int) -> int:
    return METHODS[name].cost(problem.forms, {**options, "pivoted": True})


def rows(network: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    model, data = load(network, seed, count)
    cal = sharefold.calibrate(model.eval(), data["calibration"], seed=seed)
    for group in find_groups(cal.graph):
        if len(group.members) < 2:
            continue
        problem = problem_of(cal.original, cal.graph, group.members, cal.statistics)
        for size in SIZES:
            for form, options in settings(problem, size * problem.weights.numel()):
                name, start = form.partition(",")[0], time.process_time()
                solution = METHODS[name].solve(problem, options)
                assert solution.errors is not None
                yield {
                    "network": network, "group": group.name, "layers": len(group.members), "kept": size, "form": form, **options,
                    "parameters": _cost(name, problem, **{k: v for k, v in options.items() if k != "pivoted"}),
                    "error": float(solution.errors.mean()), "cpu_seconds": round(time.process_time() - start, 2),
                    "images": count, "seed": seed,
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "forms.json")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for network in options.networks:
        for row in rows(network, options.seed, options.images):
            print(*(row[k] for k in ("network", "group", "kept", "form", "parameters", "error", "cpu_seconds")), flush=True)
            found.append(row)
    options.out.write_text(json.dumps({"hardware": hardware(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
