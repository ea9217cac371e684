"""Runs in processes of their own: killed ones, and several at once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_ranks import main as ranks

from sharefold.finetune.log import read_log

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(*command: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder, under torchrun when there are several processes."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE.parent, HERE))),
        "PYTHONFAULTHANDLER": "1",  # a process that aborts says where
    }  # fmt: skip
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    return subprocess.run([*launcher, *command], env=environment, capture_output=True, text=True, timeout=300)


def _killed(folder: Path, kills: int, seed: int) -> None:
    done = start(str(HERE / "finetune_killed.py"), str(folder), str(kills), str(seed))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["killed"] == found["alone"]
    leftovers = [p.name for p in (folder / "killed" / "run").iterdir() if "tmp" in p.name]
    assert leftovers == []


def test_killed_and_resumed_ends_with_the_bits_of_a_run_left_alone(tmp_path):
    _killed(tmp_path, kills=3, seed=0)


@pytest.mark.sweep
def test_twenty_kills(tmp_path):
    _killed(tmp_path, kills=20, seed=1)


def _losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_log(folder / "log.jsonl") if r["event"] == "train"]


@pytest.mark.parametrize("stop", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_two_processes_follow_the_losses_of_one_and_stop_and_resume_together(tmp_path, stop):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    script = str(HERE / "finetune_ranks.py")
    assert ranks(one, epochs=2) == 0
    if stop:
        stopped = start(script, str(two), "2", "7", processes=2)
        assert stopped.returncode != 0 and len(_losses(two)) == 7
    both = start(script, str(two), "2", processes=2)
    assert both.returncode == 0, both.stderr
    reference, found = _losses(one), _losses(two)
    assert len(reference) == len(found) == 20
    assert max(abs(a - b) for a, b in zip(reference, found, strict=True)) < 1e-4
    assert reference[0] - reference[-1] > 0.05  # there was something to follow
    assert (two / "digest0").read_text() == (two / "digest1").read_text()
    assert (two / "top1_0").read_text() == (two / "top1_1").read_text() == (one / "top1_0").read_text()
