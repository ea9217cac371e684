"""How long a conversion takes beside one look at its images, as ratios that were taken in one run.

    SHAREFOLD_DATA=../shared/data python benchmarks/speed.py --networks resnet20 resnet56
    python benchmarks/speed.py --networks lite0 --weights lite0.safetensors --data imagenet.npz
    python benchmarks/speed.py --networks resnet50 --images 256 --repeats 1

``resnet20`` and ``resnet56`` have public CIFAR-10 weights, ``lite0`` is timm's ``tf_efficientnet_lite0``, and ``resnet50`` has
random weights and random images of 224 x 224: shapes, time and memory. Every network is measured in a process of its own, by
one thread: CPU seconds of a plain forward pass over all calibration images (the median of five after one that does not count),
then of a conversion to half its parameters by phases, each over that pass; peak memory of the process before and after; then
the converted network's latency over the dense one's, and seconds from its file to a network that can run. Start-up times of the
command are wall-clock seconds, medians of five. Writes ``benchmarks/results/speed.json``; rows of other networks stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "speed.json"
NETWORKS = ("resnet20", "resnet56", "lite0", "resnet50")
STARTS = {
    "sharefold --help": ["--help"],
    "sharefold inspect": ["inspect", "timm:digits_resnet"],
    "sharefold convert --help": ["convert", "--help"],
}
PASSES = 5


def opened(name: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """The dense network and its normalised calibration images."""
    import torch
    from cifar import WEIGHTS, data_folder, read_split

    import sharefold
    from sharefold.data import Preprocess, calibration_images

    if name == "resnet50":
        import timm

        torch.manual_seed(0)
        return timm.create_model("resnet50").eval(), torch.randn(options.images, 3, 224, 224)
    if name == "lite0":
        source = sharefold.open_source(options.weights, arch="timm:tf_efficientnet_lite0")
        given = calibration_images(f"npz:{options.data}", Preprocess.from_cfg(source.pretrained_cfg), options.images, 0)
        return source.model.eval(), given
    source = sharefold.open_source(data_folder() / "weights" / WEIGHTS[name])
    pixels, _ = read_split(data_folder(), "train", -(-options.images // 1000))
    images = torch.from_numpy(pixels[: options.images]).permute(0, 3, 1, 2)
    return source.model.eval(), Preprocess.from_cfg(source.pretrained_cfg).normalize(images)


def look(model: Any, images: Any) -> None:
    """A plain forward pass over all images."""
    from sharefold.running import batch_of, evaluating, run_on

    with evaluating(model):
        for batch in images.split(batch_of(images)):
            run_on(model, batch)


def cpu_of(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def converted(model: Any, images: Any, budget: str) -> tuple[dict[str, float], Any, Any]:
    """CPU seconds of every phase and wall-clock seconds of all, the network, and what the conversion says of it."""
    import sharefold

    wall, network = time.perf_counter(), copy.deepcopy(model)
    calibrated, cal = cpu_of(lambda: sharefold.calibrate(copy.deepcopy(model), images))
    moments, _ = cpu_of(lambda: cal.statistics.moments(list(cal.graph.layers)))
    planned, plan = cpu_of(lambda: sharefold.plan(model, budget, cal))
    swapped, done = cpu_of(lambda: sharefold.convert_(network, plan, cal))
    times = {"calibrate": calibrated, "moments": moments, "plan": planned, "convert": swapped}
    return {**times, "whole": sum(times.values()), "wall": time.perf_counter() - wall}, network, done


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row, measured in this process."""
    import torch
    from cifar import hardware

    import sharefold
    from sharefold.bench import race_forms, race_loading
    from sharefold.measure import count_macs, count_parameters, peak_memory
    from sharefold_cli.heap import keep_freed_memory

    keep_freed_memory()  # as the command line does
    torch.set_num_threads(1)
    model, images = opened(name, options)

    passes = [cpu_of(lambda: look(model, images))[0] for _ in range(1 + PASSES)][1:]
    plain = statistics.median(passes)
    before = peak_memory()
    runs = [converted(model, images, options.budget) for _ in range(options.repeats)]
    found, network, done = [times for times, _, _ in runs], *runs[-1][1:]
    middle = {key: statistics.median(row[key] for row in found) for key in found[0]}
    example = images[:1]
    row = {
        "network": name, "budget": options.budget, "images": len(images), "repeats": options.repeats,
        "pass_cpu_seconds": round(plain, 3), "pass_spread": round((max(passes) - min(passes)) / plain, 3),
        "cpu_seconds": {key: round(value, 2) for key, value in middle.items() if key != "wall"},
        "passes": {key: round(value / plain, 2) for key, value in middle.items() if key != "wall"},
        "wall_seconds": round(middle["wall"], 1), "peak_memory_bytes": {"pass": before, "whole": peak_memory()},
        "kept": count_parameters(network) / count_parameters(model),
        "macs": count_macs(network, example) / count_macs(model, example), "agreement": done.agreement,
    }  # fmt: skip
    latency = {}
    for batch in (1, 64):
        times = race_forms(network, model, images[:batch], 7)
        latency[str(batch)] = round(times.get("auto", list(times.values())[-1]).ratio, 3)  # networks with one form have no auto
    row["latency_over_dense"] = latency
    try:
        _, loading = race_loading(network, model)
        row["load_seconds"] = {key: round(timing.median, 4) for key, timing in loading.items()}
    except sharefold.SharefoldError:  # no architecture that a file could name
        pass
    return {**row, "date": time.strftime("%Y-%m-%d"), "hardware": hardware()}


def starts() -> dict[str, float]:
    """Wall-clock seconds of commands, and of ``import sharefold``."""
    runs = {name: [sys.executable, "-m", "sharefold_cli", *words] for name, words in STARTS.items()}
    runs["import sharefold; sharefold.convert_"] = [sys.executable, "-c", "import sharefold; sharefold.convert_"]
    found = {}
    for name, words in runs.items():
        times = []
        for _ in range(1 + PASSES):
            start = time.perf_counter()
            subprocess.run(words, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        found[name] = round(statistics.median(times[1:]), 3)
    return found


def apart(script: str, *words: str) -> dict[str, Any]:
    """The row that ``script`` prints last, run in a process of its own by one thread."""
    command = [sys.executable, "-W", "ignore", script, *words]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20", "resnet56"])
    parser.add_argument("--budget", default="50%")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1, help="conversions")
    parser.add_argument("--weights", type=Path, help="for lite0: a state dict")
    parser.add_argument("--data", type=Path, help="for lite0: an npz with train_x")
    parser.add_argument("--one", action="store_true", help="measure in this process and print the row")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.networks[0], options)))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    known["start_seconds"] = starts()
    for name in options.networks:
        row = apart(__file__, *sys.argv[1:], "--one", "--networks", name)
        known["rows"] = [other for other in known["rows"] if other["network"] != name] + [row]
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        told = ("network", "pass_cpu_seconds", "passes", "wall_seconds", "latency_over_dense")
        print({key: row[key] for key in told}, flush=True)


if __name__ == "__main__":
    main()
