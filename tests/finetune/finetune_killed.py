"""Kills a fine-tuning run again and again; prints the weights' hash of the survivor and of a run left alone.

Started as a process of its own, with one thread: everything is imported once, each attempt is a fork.
usage: finetune_killed.py FOLDER KILLS SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (a run draws at its end)
import torch
from finetune_nets import digest, images_and_labels, shared_net

import sharefold.finetune

torch.set_num_threads(1)


def run(folder: Path) -> None:
    """One attempt: resumes what is there, and leaves the hash of the final weights."""
    model = shared_net()
    sharefold.finetune(
        model,
        images_and_labels(64),
        images_and_labels(32, seed=1),
        teacher=shared_net(seed=1),
        block_match=0.1,
        epochs=3,
        batch_size=8,
        run_dir=folder / "run",
        resume=True,
        checkpoint_steps=2,
        log_steps=3,
        quiet=True,
        device="cpu",
    )
    (folder / "digest").write_text(digest(model))


def attempt(folder: Path, kill_after: float | None) -> bool:
    """Runs in a fork, killed after some seconds; True when it came to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(folder)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + (kill_after if kill_after is not None else 120)
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            if status:
                raise SystemExit(f"the run failed with status {status}")
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main(folder: Path, kills: int, seed: int) -> None:
    for name in ("alone", "warm", "killed"):
        (folder / name).mkdir()
    attempt(folder / "warm", None)
    start = time.monotonic()
    attempt(folder / "alone", None)
    whole = time.monotonic() - start
    moments = random.Random(seed)
    killed = 0
    while killed < kills:  # a run that ends before its next kill begins anew, until all kills are spent
        if attempt(folder / "killed", moments.uniform(0, whole)):
            if (folder / "killed" / "digest").read_text() != (folder / "alone" / "digest").read_text():
                break
            for path in (folder / "killed" / "run").iterdir():
                path.unlink()
        else:
            killed += 1
    attempt(folder / "killed", None)
    hashes = {name: (folder / name / "digest").read_text() for name in ("alone", "killed")}
    print(json.dumps({**hashes, "kills": killed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
