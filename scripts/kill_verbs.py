"""Kills every verb that writes at random moments: the old output or the new one is there, and the next run leaves nothing else.

    python scripts/kill_verbs.py --kills 30 [--verb convert,finetune,export,sweep,save]

Each verb runs once undisturbed, for the time it takes; then over its own output with ``--force``, killed (SIGKILL) at a moment
drawn anew, most of them near the end, where it writes. After each kill the output must load; after a last undisturbed run
nothing but it may lie in the folder. Exit code 1 when something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PLAN = {"groups": [], "params_before": 0, "params_after": 0}
CLI = (sys.executable, "-m", "sharefold_cli")
SAVE = """import sharefold
m = sharefold.load('source')
for _ in range(10): sharefold.save(m, 'out', force=True)"""
LOAD = "import sys, sharefold; sharefold.load(sys.argv[1])"
VERBS: dict[str, tuple[list[str], str]] = {
    "convert": ([*CLI, "convert", "timm:digits_resnet", "--plan", "plan.json", "--calib", "digits", "--calib-count", "16",
                 "--no-repair", "-o", "out"], "out"),
    "finetune": ([*CLI, "finetune", "source", "--data", "digits", "--epochs", "1", "--limit", "128", "--batch-size", "64",
                  "--checkpoint-steps", "1", "-o", "out"], "out"),
    "export": ([*CLI, "export", "source", "--format", "dense", "-o", "out.safetensors"], "out.safetensors"),
    "sweep": ([*CLI, "sweep", "timm:digits_resnet", "--budgets", "60%", "--data", "digits", "--limit", "50", "--calib-count",
               "16", "--no-repair", "-o", "out"], "out"),
    "save": ([sys.executable, "-c", SAVE], "out"),
}  # fmt: skip


def whole(folder: Path, verb: str, output: str) -> str:
    """"" when the output is there and can be read, else what is wrong with it."""
    path = folder / output
    if verb == "sweep":
        try:
            json.loads((path / "sweep.json").read_text())
        except (OSError, ValueError):
            return "sweep.json is gone or damaged"
        networks = sorted(p.parent for p in path.glob("*/model.safetensors"))
        if not networks:
            return "no network in the sweep"
        path = networks[0]
    if verb == "export":
        code = "import sys; from safetensors.torch import load_file; assert load_file(sys.argv[1])"
    else:
        code = LOAD
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=folder, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["not readable"])[-1]


def leftovers(folder: Path, expected: set[str]) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in expected)


def trial(verb: str, kills: int, seed: int) -> dict[str, Any]:
    command, output = VERBS[verb]
    force = [] if verb == "save" else ["--force"]
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix=f"sharefold-kill-{verb}-") as place:
        folder = Path(place)
        (folder / "plan.json").write_text(json.dumps(PLAN))
        subprocess.run(
            [*VERBS["convert"][0][:-1], "source", "--quiet"], cwd=folder, check=True
        )  # fmt: skip
        expected = {"plan.json", "source", output, *([f"{output}.run"] if verb == "finetune" else [])}
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        took = time.perf_counter() - start
        killed = seen = number = 0
        while killed < kills and number < 4 * kills:
            draw = random.Random(f"{verb} {seed} {number}")
            moment = took * (draw.uniform(0.6, 1.05) if number % 3 else draw.random())
            number, start = number + 1, time.perf_counter()
            process = subprocess.Popen([*command, *force], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(moment)
                took = time.perf_counter() - start  # it came to its end: the machine has become faster
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            seen += bool(leftovers(folder, expected))
            wrong = whole(folder, verb, output)
            if wrong:
                problems.append(f"{verb} run {number} after {moment:.2f} s: {wrong}")
        done = subprocess.run([*command, *force], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            problems.append(f"{verb}: the last run failed: {done.stderr.strip()}")
        left = leftovers(folder, expected) or [p.name for p in folder.glob("out*/.*")]
        if left:
            problems.append(f"{verb}: left behind after the last run: {', '.join(left)}")
    return {"verb": verb, "kills": killed, "with_leftovers_before_the_next_run": seen, "problems": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--verb", default=",".join(VERBS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bad = False
    for verb in given.verb.split(","):
        result = trial(verb, given.kills, given.seed)
        print(result, flush=True)
        bad |= bool(result["problems"])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
