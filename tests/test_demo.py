"""The demonstration, in a smaller edition: figures that hold, files that load, folders that are respected."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import call
from PIL import Image

import sharefold
from sharefold.demo import Demo, run_demo
from sharefold.errors import SharefoldError
from sharefold.models.digits_resnet import WEIGHTS


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Demo, list[tuple[str, int, int]]]:
    steps: list[tuple[str, int, int]] = []
    out = tmp_path_factory.mktemp("demo") / "out"
    demo = run_demo(out, epochs=2, sizes=(0.12,), progress=lambda *step: steps.append(step))
    return out, demo, steps


def test_the_network_that_comes_along_reads_digits() -> None:
    assert WEIGHTS.stat().st_size < 1_500_000
    source = sharefold.open_source("timm:digits_resnet")
    assert sum(p.numel() for p in source.model.parameters()) == 198_898
    assert (
        source.base == {"library": "timm", "name": "digits_resnet", "kwargs": {}}
        or source.base["name"] == "digits_resnet"
    )


def test_the_table_tells_the_story(shown: tuple[Path, Demo, list]) -> None:
    _, demo, _ = shown
    original, average, basis, auto, tiny, tuned = demo.rows
    assert original.top1 > 0.985 and original.params == 198_898
    assert [row.method for row in demo.rows] == ["none", "average", "basis", "auto", "auto", "auto"]
    assert average.params <= 0.2 * original.params
    assert max(basis.params, auto.params) <= average.params
    assert average.top1 < 0.9 < 0.95 < min(basis.top1, auto.top1)
    assert tiny.params == tuned.params <= 0.08 * original.params
    # Two epochs are a start; what conversion leaves is hard to improve on in so few.
    assert tiny.top1 > 0.95 and tuned.top1 > 0.95
    assert all(0 <= row.top1 <= 1 and row.size == row.params / original.params for row in demo.rows)


def test_what_is_written_loads_and_agrees(shown: tuple[Path, Demo, list]) -> None:
    out, demo, steps = shown
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png", "digits-shared"]
    assert demo.identical and demo.expanded_difference < 1e-4
    model = sharefold.load(out / "digits-shared")
    assert sum(p.numel() for p in model.parameters()) == demo.rows[-1].params
    assert demo.file_bytes == (out / "digits-shared" / "model.safetensors").stat().st_size < demo.dense_bytes / 5
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    record = json.loads((out / "demo.json").read_text())
    assert record["rows"][-1]["top1"] == demo.rows[-1].top1 and record["curve"].keys() == {"average", "basis", "auto"}
    config = json.loads((out / "digits-shared" / "sharefold_config.json").read_text())
    assert str(WEIGHTS.parent) not in json.dumps(config), "a path of this machine is in the file"
    assert steps[-1][0] == "tuning" and [s for s in steps if s[0] == "converting"][-1][1:] == (7, 7)


def test_the_picture_is_one(shown: tuple[Path, Demo, list]) -> None:
    with Image.open(shown[0] / "demo.png") as image:
        assert image.size[0] > 1000 and image.size[1] > 400
        colors = image.convert("RGB").getcolors(1 << 24)
    assert colors is not None and len(colors) > 100


def test_folders_are_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sharefold.demo import run as module

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for place, words in (("mine", "exists"), ("no/such", "does not exist")):
        result = call("demo", "-o", tmp_path / place)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "demo.json").write_text("{}")
    assert module._check_folder(tmp_path / "earlier", False) == tmp_path / "earlier"
    (tmp_path / "empty").mkdir()
    assert module._check_folder(tmp_path / "empty", False) == tmp_path / "empty"
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(SharefoldError, match=r"scikit-learn is missing: pip install 'sharefold\[demo\]'"):
        run_demo(tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["earlier", "empty", "mine"]


def test_the_command_prints_one_object(tmp_path: Path) -> None:
    """A whole run in a process of its own, as a user would start it, without the network."""
    code = (
        "import socket, sys\n"
        "def no(*a, **k): raise OSError('no network')\n"
        "socket.socket.connect = no\n"
        "from sharefold.demo import run\n"
        "from sharefold.planner import candidates, decide\n"
        "run.CALIBRATION = 120\n"
        "candidates.AUTO = decide.AUTO = ('basis', 'svd')\n"  # what all four make of it is seen above
        "from sharefold_cli.entry import main\n"
        "sys.argv = ['sharefold', 'demo', '-o', 'out', '--epochs', '1', '--json']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"] and report["output"] == "out" and len(report["rows"]) == 6
    assert "costs accuracy" in done.stderr and "converting: 10 of 10" in done.stderr
