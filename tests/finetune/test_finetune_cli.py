"""The verb ``finetune`` on a real, small, untrained network."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from command_line import call
from safetensors.torch import save_file

import sharefold
from sharefold.finetune.log import read_log

NET = "timm:resnet20_cifar"
QUICK = ["--epochs", "1", "--batch-size", "16", "--device", "cpu"]


@pytest.fixture(scope="module")
def shared(shared_cifar: tuple[Path, dict]) -> Path:
    return shared_cifar[0]


@pytest.fixture(scope="module")
def npz(labelled_npz: str) -> str:
    return labelled_npz


def _dense(path: Path, classes: int = 10) -> Path:
    """A checkpoint of the dense network with random weights."""
    model = timm.create_model("resnet20_cifar", num_classes=classes)
    save_file(model.state_dict(), str(path))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _dense(tmp_path_factory.mktemp("teacher") / "dense.safetensors")


def test_a_shared_directory_in_a_better_one_out(shared: Path, npz: str, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    options = ("--teacher", teacher, "--val-limit", 10, "--limit", 32, "--json", "-o", out)
    result = call("finetune", shared, "--data", npz, *QUICK, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"top1_before", "top1_after", "epochs", "seconds", "output"} <= set(found)
    assert (found["epochs"], found["updates"], found["history"][0]["images"]) == (1, 2, 10)
    assert 0 <= found["top1_after"] <= 1 and found["output"] == str(out)
    model, before = sharefold.load(out), sharefold.load(shared)
    assert sum(p.numel() for p in model.parameters()) == found["params"] == sum(p.numel() for p in before.parameters())
    name = next(name for name in model.state_dict() if name.endswith(".basis"))
    assert not torch.equal(model.state_dict()[name], before.state_dict()[name])
    metrics = json.loads((out / "sharefold_config.json").read_text())["metrics"]
    assert metrics["top1"] == found["top1_after"] and metrics["finetune"]["updates"] == 2
    assert metrics["finetune"]["config"]["batch_size"] == 16
    assert "top1" in (out / "README.md").read_text()
    assert {p.name for p in (tmp_path / "tuned.run").iterdir()} >= {"state.pt", "log.jsonl"}
    again = call("finetune", shared, "--data", npz, *QUICK, "-o", out)
    assert again.exit_code == 2 and "--force" in again.stderr


def test_distillation_alone_and_one_file_as_output(shared: Path, npz: str, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    options = ("--teacher", teacher, "--no-labels", "--no-val", "--block-match", 0.5, "-o", out, "--json")
    result = call("finetune", shared, "--data", npz, *QUICK, *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["top1_after"] is None
    train = [r for r in read_log(tmp_path / "tuned.safetensors.run" / "log.jsonl") if r["event"] == "train"]
    assert {"distill", "blocks", "orthogonality"} <= set(train[-1]) and "labels" not in train[-1]
    sharefold.load(out)


def test_a_published_schedule_trains_a_network_that_shares_by_design(npz: str, tmp_path: Path) -> None:
    out = tmp_path / "lrunet"
    result = call(
        "finetune",
        "timm:lrunet",
        "--no-pretrained",
        "--data",
        npz,
        "--recipe-schedule",
        "lrunet",
        *QUICK,
        "--limit",
        32,
        "--no-val",
        "-o",
        out,
        "--json",
    )
    assert result.exit_code == 0, result.output
    record = json.loads((out / "sharefold_config.json").read_text())
    assert record["pretrained_cfg"]["mean"] == [0.0, 0.0, 0.0]
    assert record["metrics"]["finetune"]["config"]["weight_decay"] == 5e-4
    images = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        assert sharefold.load(out)(images).shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--no-labels",), "--no-labels needs --teacher"),
        (("--lr", "0"), "lr=0.0: must be positive"),
        (("--orthogonality", "-1"), "orthogonality=-1.0: must not be negative"),
        (("--recipe-schedule", "lrunett"), "lrunet"),
        (("--batch-size", "64"), "use at most 48"),
        (("--augment", "swirl"), "unknown part 'swirl'"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(shared: Path, npz: str, tmp_path: Path, options, words: str) -> None:
    base = QUICK if "--batch-size" not in options else QUICK[:2]
    result = call("finetune", shared, "--data", npz, *base, *options, "-o", tmp_path / "x")
    assert result.exit_code == 2, result.output
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") and words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_classes_is_refused(shared: Path, npz: str, tmp_path: Path) -> None:
    teacher = _dense(tmp_path / "seven.safetensors", classes=7)
    result = call("finetune", shared, "--data", npz, *QUICK, "--teacher", teacher, "-o", tmp_path / "x")
    assert result.exit_code == 2 and "the teacher has 7 classes, the model 10" in result.stderr


def test_a_run_that_makes_it_worse_says_so(tmp_path: Path) -> None:
    convert = ("--calib", "digits", "--calib-count", 100, "--no-repair", "--budget", "40%", "--method", "svd")
    assert call("convert", "timm:digits_resnet", *convert, "-o", tmp_path / "net").exit_code == 0
    options = ("--data", "digits", "--limit", 320, "--epochs", 1, "--batch-size", 64, "--augment", "none", "--device", "cpu")
    worse = call("finetune", tmp_path / "net", *options, "--lr", 1, "--ema", 0, "-o", tmp_path / "worse")
    assert worse.exit_code == 0 and "warning: top-1 fell from" in worse.stderr and (tmp_path / "worse").exists()
    same = call("finetune", tmp_path / "net", *options, "--lr", 1e-7, "-o", tmp_path / "same")
    assert same.exit_code == 0 and "fell" not in same.stderr


def test_schedules_are_listed() -> None:
    result = call("finetune", "--list-schedules")
    assert result.exit_code == 0 and "filter-bases-cifar10" in result.stdout


def test_a_finished_run_writes_its_result_once(shared: Path, npz: str, tmp_path: Path) -> None:
    out = tmp_path / "tuned.safetensors"
    command = ("finetune", shared, "--data", npz, *QUICK, "--limit", 16, "--no-val", "-o", out)
    assert call(*command).exit_code == 0
    written = out.read_bytes(), out.stat().st_mtime_ns
    result = call(*command, "--resume")
    assert result.exit_code == 0, result.output
    assert "the run had ended before; left as it is (--force writes it anew)" in result.output.replace("\n", " ")
    assert (out.read_bytes(), out.stat().st_mtime_ns) == written
    assert call(*command, "--resume", "--force").exit_code == 0 and out.stat().st_mtime_ns > written[1]
    # What lies there from before the run's last state is not its result: the run ended, and was killed before it could write.
    os.utime(out, ns=(0, 0))
    result = call(*command, "--resume", "--json")
    assert json.loads(result.stdout)["output"] == str(out) and out.stat().st_mtime_ns > written[1]


def test_ctrl_c_saves_exits_130_and_resumes(shared: Path, npz: str, tmp_path: Path) -> None:
    out, log = tmp_path / "tuned", tmp_path / "tuned.run" / "log.jsonl"
    command = [
        sys.executable,
        "-m",
        "sharefold_cli",
        "finetune",
        str(shared),
        "--data",
        npz,
        "-o",
        str(out),
        "--epochs",
        "20",
        "--batch-size",
        "16",
        "--log-steps",
        "1",
        "--no-val",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(read_log(log)) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "go on with --resume" in said and "Traceback" not in said and not out.exists()
    done = len(read_log(log))
    assert 2 < done < 60
    result = call(*command[3:], "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["updates"] == 60 and len([r for r in read_log(log) if r["event"] == "train"]) == 60
    assert (out / "model.safetensors").exists()
