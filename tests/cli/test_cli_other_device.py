"""Every verb that takes ``--device``, on a device that is not the CPU (tests/other_device.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import pytest
from click.testing import Result
from other_device import other_device

import sharefold

NET = ("timm:digits_resnet:blocks=2,width=16", "--no-pretrained")


def invoke(*args: object, doubles: bool = True) -> Result:
    with other_device(doubles):
        return command_line.call(*args, "--device", "meta", "--json")


def call(*args: object, doubles: bool = True) -> dict[str, Any]:
    result = invoke(*args, doubles=doubles)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, grey_npz: str) -> Path:
    out = tmp_path_factory.mktemp("out") / "net"
    call("convert", *NET, "--calib", grey_npz, "--budget", "60%", "--method", "basis", "--store", "int8", "-o", out)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, grey_npz: str) -> Path:
    """With pivots, in float32; made on the CPU."""
    out = tmp_path_factory.mktemp("plain") / "net"
    wish = ("--budget", "60%", "--method", "spatial", "--no-repair")
    done = command_line.call("convert", *NET, "--calib", grey_npz, *wish, "-o", out)
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize(
    "wish",
    [
        ("--budget", "70% MACs", "--method", "fold"),
        ("--budget", "100% latency", "--method", "svd"),
        ("--budget", "32kB", "--method", "basis"),
        ("--keep-agreement", "50%", "--method", "average"),
        ("--recipe", "sharesnet"),
        ("--budget", "60%", "--method", "svd", "--refine", "1", "--store", "int8"),
        ("--budget", "60%", "--dry-run", "--method", "svd"),
    ],
    ids=" ".join,
)
def test_convert(wish: tuple[str, ...], grey_npz: str, tmp_path: Path) -> None:
    out = tmp_path / "net"
    report = call("convert", *NET, "--calib", grey_npz, *wish, "-o", out)
    assert report["params"]["before"] == 42_362
    if "--dry-run" in wish:
        assert not out.exists()
    else:
        model = sharefold.load(out)
        assert sum(p.numel() for p in model.parameters()) == report["params"]["after"]
        assert all(tensor.device.type == "cpu" for tensor in model.state_dict().values())


@pytest.mark.parametrize("doubles", [True, False], ids=["", "no float64"])
def test_verbs_that_read_a_shared_network(
    shared: Path, plain: Path, grey_npz: str, tmp_path: Path, doubles: bool
) -> None:
    assert call("eval", shared, "--data", grey_npz, doubles=doubles)["images"] == 30
    assert call("bench", shared, "--repeats", 2, doubles=doubles)["device"] == "meta"
    tuning = ("--data", grey_npz, "--limit", 40, "--epochs", 1, "--batch-size", 10, "--ema", 0)
    assert call("finetune", shared, *tuning, "-o", tmp_path / "tuned", doubles=doubles)
    assert call("finetune", plain, *tuning, "-o", tmp_path / "pivoted", doubles=doubles)
    for name in ("tuned", "pivoted"):
        assert all(tensor.isfinite().all() for tensor in sharefold.load(tmp_path / name).state_dict().values())
    assert call("report", shared, "-o", tmp_path / "page.html", doubles=doubles)
    assert call("export", shared, "-o", tmp_path / "net.onnx", doubles=doubles)["max_difference"] < 1e-3
    assert call("expand", shared, "-o", tmp_path / "dense.safetensors", doubles=doubles)
    assert call("inspect", *NET, doubles=doubles)["params"] == 42_362


def test_solvers_want_float64(grey_npz: str, tmp_path: Path) -> None:
    result = invoke("convert", *NET, "--calib", grey_npz, "--budget", "60%", "-o", tmp_path / "net", doubles=False)
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "no float64" in result.stderr.splitlines()[-1] and "--device cpu" in result.stderr.splitlines()[-1]


def test_sweep(grey_npz: str, tmp_path: Path) -> None:
    report = call("sweep", *NET, "--data", grey_npz, "--budgets", "60%,40%", "--method", "basis", "-o", tmp_path / "curve")
    assert [point["budget"] for point in report["points"]] == ["dense", "60%", "40%"]
