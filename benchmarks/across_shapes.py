"""One bank for layers of different widths, against a bank a shape and against nothing shared.

    SHAREFOLD_DATA=../shared/data OMP_NUM_THREADS=2 python benchmarks/across_shapes.py

All 3x3 convolutions of a network, the same number of parameters for each way:

    across     one basis; a layer of I inputs takes the first I channels of every filter
    per shape  one basis for each group of equal shapes
    svd        low rank a layer
    spatial    column and row filters a layer

Ranks of groups and layers are allocated to make the sum of the errors small. What counts is the mean over the layers of the
relative output error on 1,000 training images. Slices are zero-padded layers: their missing inputs have no variance and no
weight, so that the solver of isomorphic layers solves them too.
Writes results/across_shapes.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from cifar import WEIGHTS, hardware
from label_free import load
from torch import nn

from sharefold.calibration.problem import problem_of
from sharefold.calibration.ragged import problem_for
from sharefold.calibration.statistics import statistics_of
from sharefold.graph import analyze
from sharefold.solvers import low_rank, separable, shared_basis
from sharefold.solvers.allocate import Option, allocate
from sharefold.solvers.curves import CurvePoint
from sharefold.solvers.data_norm import Problem

RESULTS = Path(__file__).parent / "results" / "across_shapes.json"
SHARES = (0.5, 0.35, 0.25, 0.15)


def problems(network: str, seed: int, count: int) -> tuple[Problem, list[Problem]]:
    """The 3x3 convolutions with as many inputs as outputs: all as one problem, and a problem for each shape."""
    model, data = load(network, seed, count)
    graph = analyze(model, data["calibration"][:1])
    statistics = statistics_of(model, graph, data["calibration"], seed)
    shapes: dict[int, list[str]] = {}
    for name in graph.layers:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.in_channels == layer.out_channels:
            shapes.setdefault(layer.in_channels, []).append(name)
    everything = problem_for(model, graph, [name for names in shapes.values() for name in names], statistics)
    return everything.flat(), [problem_of(model, graph, names, statistics).flat() for names in shapes.values()]


def allocated(curves: list[list[CurvePoint]], budget: float) -> list[int]:
    """The rank of every entry, least sum of its layers' errors within the budget."""
    picks = allocate([[Option(p.cost, float(p.errors.sum())) for p in points] for points in curves], budget)
    return [points[pick].rank for points, pick in zip(curves, picks, strict=True)]


def measure(everything: Problem, shared: list[Problem], share: float) -> dict[str, float]:
    """Mean relative error of every way, at ``share`` of the parameters."""
    budget = share * sum(p.members * p.rows * p.columns for p in shared)
    rows = sum(p.members * p.rows for p in shared)
    errors = {"across": [shared_basis.solve(everything, int(budget / (everything.columns + rows))).errors]}
    ranks = allocated([shared_basis.curve(p, range(1, shared_basis.max_rank(p)), iterations=5) for p in shared], budget)
    errors["per shape"] = [shared_basis.solve(p, rank).errors for p, rank in zip(shared, ranks, strict=True)]
    alone = [p.select([k]) for p in shared for k in range(p.members)]
    ranks = allocated([low_rank.svd_curve(p, range(1, p.rows)) for p in alone], budget)
    errors["svd"] = [low_rank.svd_solve(p, rank).errors for p, rank in zip(alone, ranks, strict=True)]
    ranks = allocated([separable.curve(p, range(1, 3 * p.rows // 2 + 1), iterations=5) for p in alone], budget)
    errors["spatial"] = [separable.solve(p, rank).errors for p, rank in zip(alone, ranks, strict=True)]
    return {way: float(torch.cat(found).mean()) for way, found in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        everything, shared = problems(network, options.seed, options.images)
        for share in options.shares:
            start = time.perf_counter()
            row = {"network": network, "share": share, "images": options.images, "seed": options.seed}
            row |= measure(everything, shared, share)
            rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
            print(rows[-1], flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
