"""Which architectures the tool takes: every model of four libraries' registries, converted to 50 %.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py --family-samples 1
    OMP_NUM_THREADS=1 python benchmarks/coverage.py --match 'resnet' --again failed

Networks of at most ``--limit-params`` parameters go through the whole job for real: random weights, a few procedural
images of the smallest size that the network takes, inspect, plan, convert without repairs, run, save, load, equal
outputs bit for bit. Larger ones are built on the meta device, planned by uniform ranks, converted with blank tensors,
counted and run there; those whose forward code reads values do the same on the CPU. From timm only conv-dominated
networks are converted: more than half of the parameters in convolutions, or in Linears that run at every position of a
map. From torchvision: all for classification, segmentation, detection and video, and the twins of
torchvision.models.quantization, which are made for quantisation and run in floats. Of segmentation_models_pytorch every
decoder with its default encoder and with a small one, of ultralytics every network that it ships, each where the package is
installed; ``--library ultralytics`` leaves out all others.

Every model runs in a process of its own, so that a crash, a memory limit or ``--seconds`` costs one line. Writes
results/coverage.csv after every model; rows that are there stay unless ``--again``. One model of each family comes
first. Shards may run at the same time. The default method is ``basis svd``: the candidates of ``auto`` but for
``spatial``, whose alternating fits would take most of the time. The exit code is 1 when a row says ``failed``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from architectures import guarded, missing, read, record
from coverage_check import Row, check

from sharefold.architectures.build import registry, torchvision_builder

RESULTS = Path(__file__).parent / "results" / "coverage.csv"
LIBRARIES = ("timm", "torchvision", "smp", "ultralytics")
# A decoder's default encoder, and a small one with which it goes through the whole job.
ENCODERS = ("", ":encoder_name=tu-mobilenetv3_small_100")
TRANSFORMERS = {"dpt": (":encoder_name=tu-vit_tiny_patch16_224",)}  # which alone this decoder takes
SMALL = re.compile(r"atto|femto|pico|nano|tiny|xxs|small|mobile|_050|_s0|_b0|_m0|_t0|18|_xs|_s\b|_0|\dn(-|$)")


def entries(library: str | None = None, match: str | None = None) -> list[Row]:
    """Blank rows of all models; first one of each family (a small one where the name tells), then a second ..."""
    rows = []
    if library in (None, "timm"):
        names = registry("timm")
        rows += [Row(n, "timm", timm.models.model_entrypoint(n).__module__.rpartition(".")[2]) for n in names]
    if library in (None, "torchvision"):
        models = torchvision.models
        for kind in ("", "segmentation", "detection", "quantization", "video"):
            for name in models.list_models(module=getattr(models, kind) if kind else models):
                file = torchvision_builder(name).__module__.rpartition(".")[2]
                rows.append(Row(name, "torchvision", f"{kind}.{file}" if kind else file))
    if library in (None, "smp"):
        for name in registry("smp"):
            rows += [Row(f"{name}{encoder}", "smp", name) for encoder in TRANSFORMERS.get(name, ENCODERS)]
    if library in (None, "ultralytics"):
        rows += [Row(name, "ultralytics", re.sub(r"(\d)[a-z](?=-|$)", r"\1", name)) for name in registry("ultralytics")]
    place: Counter[tuple[str, str]] = Counter()
    ranks = {}
    for row in sorted(rows, key=lambda row: (not SMALL.search(row.model), row.model)):
        ranks[row.library, row.model] = place[row.library, row.family]
        place[row.library, row.family] += 1
    rows.sort(key=lambda row: (ranks[row.library, row.model], row.library, row.family))
    return [row for row in rows if match is None or re.search(match, row.model)]


def sampled(rows: Iterable[Row], count: int | None) -> list[Row]:
    """The first ``count`` rows of every family."""
    seen: Counter[tuple[str, str]] = Counter()
    chosen = []
    for row in rows:
        seen[row.library, row.family] += 1
        if count is None or seen[row.library, row.family] <= count:
            chosen.append(row)
    return chosen


def verdict(row: dict[str, str]) -> str:
    """What became of a model, in one of a few words."""
    if row["reason"].startswith(("failed", "timeout", "not conv-dominated", "cannot be built", "nothing to share")):
        return row["reason"].partition(":")[0]
    if row["reduced_to"]:
        return f"converted ({row['mode']}{', at its floor' if row['reason'] else ''})"
    return "other stated reason"


def summary(rows: Iterable[dict[str, str]]) -> str:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["library"], Counter())[verdict(row)] += 1
    lines = []
    for library, found in sorted(counts.items()):
        lines.append(f"{library}: {sum(found.values())} models")
        lines += [f"  {count:5}  {what}" for what, count in sorted(found.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--match", metavar="REGEX", help="only models whose name it is found in")
    parser.add_argument("--family-samples", type=int, metavar="N", help="only the first N models of each family")
    parser.add_argument("--limit-params", type=int, default=8_000_000, help="above it: plan and count only")
    parser.add_argument("--seconds", type=float, default=300, help="most time for a model")
    parser.add_argument("--method", nargs="+", default=["basis", "svd"], help="what competes")
    parser.add_argument("--shard", metavar="K/N", help="only every N-th model, from K = 0 to N-1")
    parser.add_argument("--again", nargs="?", const="all", choices=("all", "failed"), help="redo rows that are there")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    part, parts = (int(n) for n in (options.shard or "0/1").split("/"))
    method = "auto" if options.method == ["auto"] else options.method
    rows = sampled(entries(options.library, options.match), options.family_samples)[part::parts]
    waiting = missing(rows, options.output, options.again)
    for index, row in enumerate(waiting, start=1):
        row = guarded(partial(check, limit=options.limit_params, method=method), row, options.seconds)
        record(options.output, row)
        share = "" if row.reduced_to is None else f"{row.reduced_to:.1%} {row.mode} {row.traced}"
        print(f"{index}/{len(waiting)} {row.library}:{row.model} {row.seconds} s {share} {row.reason}", flush=True)
    asked = {(row.library, row.model) for row in rows}
    found = [row for key, row in read(options.output).items() if key in asked]
    print(summary(found))
    return int(any(verdict(row) == "failed" for row in found))


if __name__ == "__main__":
    sys.exit(main())
