"""What threads are worth, and what they cost where other programs use the cores too: ``python benchmarks/threads.py``.

Converts the digits network by one thread and by as many as there are cores, each with OpenMP's threads spinning or sleeping
while they wait, on an idle machine and beside as many busy processes as there are cores. Every case is a process of its own,
since OpenMP reads its settings once. Prints a table and writes ``benchmarks/results/threads.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "threads.json"
CODE = """import sys, time, json, torch, sharefold
from sharefold.data import calibration_images
torch.set_num_threads(int(sys.argv[1]))
source = sharefold.open_source("timm:digits_resnet")
images = calibration_images("digits", source.pretrained_cfg, 600, 0)
wall, cpu = time.perf_counter(), time.process_time()
cal = sharefold.calibrate(source.model, images)
plan = sharefold.plan(source.model, "50%", cal, method=("basis", "svd"))
sharefold.convert_(source.model, plan, cal)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))"""


def busy() -> None:
    while True:
        sum(range(1000))


def measured(threads: int, policy: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_WAIT_POLICY": policy}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE, str(threads)], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    rows = []
    for beside in (0, cores):
        others = [multiprocessing.Process(target=busy, daemon=True) for _ in range(beside)]
        for other in others:
            other.start()
        for threads in (1, cores):
            for policy in ("ACTIVE", "PASSIVE"):
                found = [measured(threads, policy) for _ in range(options.repeats)]
                row = {"busy": beside, "threads": threads, "policy": policy, "repeats": options.repeats}
                row |= {key: round(statistics.median(one[key] for one in found), 2) for key in ("wall", "cpu")}
                rows.append(row)
                print("{busy} busy processes, {threads} threads, {policy}: {wall} s, {cpu} CPU s".format(**row), flush=True)
        for other in others:
            other.terminate()
    RESULTS.write_text(json.dumps({"cores": cores, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
