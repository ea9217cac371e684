"""The demonstration, in a smaller edition: figures that hold, files that load, folders that are respected."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from PIL import Image

import sharefold
from sharefold.demo import run_demo
from sharefold.demo.results import Row
from sharefold.errors import SharefoldError
from sharefold.models.digits_resnet import WEIGHTS

# A whole run in a process of its own, as a user would start it, without the network; of fewer images, and of further sizes one
# alone.
COMMAND = """
import socket, sys
def no(*a, **k): raise OSError('no network')
socket.socket.connect = no
from functools import partial
from sharefold import demo
demo.run.CALIBRATION = 200
demo.run_demo = partial(demo.run_demo, sizes=(0.12,))
from sharefold_cli.entry import main
sys.argv = ['sharefold', 'demo', '-o', 'out', '--epochs', '2', '--json']
main()
"""


@dataclass
class Shown:
    """What the command wrote: into its folder, to its output, to its errors."""

    out: Path
    report: dict[str, Any]
    stderr: str

    @property
    def rows(self) -> list[Row]:
        return [Row(**row) for row in self.report["rows"]]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    place = tmp_path_factory.mktemp("demo")
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, cwd=place, timeout=600)
    assert done.returncode == 0, done.stderr
    return Shown(place / "out", json.loads(done.stdout), done.stderr)


def test_the_network_that_comes_along_reads_digits() -> None:
    assert WEIGHTS.stat().st_size < 1_500_000
    source = sharefold.open_source("timm:digits_resnet")
    assert sum(p.numel() for p in source.model.parameters()) == 198_898
    assert (
        source.base == {"library": "timm", "name": "digits_resnet", "kwargs": {}}
        or source.base["name"] == "digits_resnet"
    )


def test_the_table_tells_the_story(shown: Shown) -> None:
    original, average, basis, auto, tiny, tuned = shown.rows
    assert original.top1 > 0.985 and original.params == 198_898
    assert [row.method for row in shown.rows] == ["none", "average", "basis", "auto", "auto", "auto"]
    assert average.params <= 0.2 * original.params
    assert max(basis.params, auto.params) <= average.params
    assert average.top1 < 0.9 < 0.95 < min(basis.top1, auto.top1)
    assert tiny.params == tuned.params <= 0.08 * original.params
    # Two epochs are a start; what conversion leaves is hard to improve on in so few.
    assert tiny.top1 > 0.95 and tuned.top1 > 0.95
    assert all(0 <= row.top1 <= 1 and row.size == row.params / original.params for row in shown.rows)


def test_what_is_written_loads_and_agrees(shown: Shown) -> None:
    out, report = shown.out, shown.report
    assert sorted(p.name for p in out.iterdir()) == ["demo.json", "demo.png", "digits-shared"]
    assert report["identical"] and report["expanded_difference"] < 1e-4
    model = sharefold.load(out / "digits-shared")
    assert sum(p.numel() for p in model.parameters()) == shown.rows[-1].params
    assert report["file_bytes"] == (out / "digits-shared" / "model.safetensors").stat().st_size < report["dense_bytes"] / 5
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    record = json.loads((out / "demo.json").read_text())
    assert record["rows"][-1]["top1"] == shown.rows[-1].top1 and record["curve"].keys() == {"average", "basis", "auto"}
    config = json.loads((out / "digits-shared" / "sharefold_config.json").read_text())
    assert str(WEIGHTS.parent) not in json.dumps(config), "a path of this machine is in the file"


def test_the_picture_is_one(shown: Shown) -> None:
    with Image.open(shown.out / "demo.png") as image:
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


def test_the_command_prints_one_object(shown: Shown) -> None:
    assert shown.report["identical"] and shown.report["output"] == "out" and len(shown.rows) == 6
    assert "costs accuracy" in shown.stderr and "converting: 7 of 7" in shown.stderr and "tuning: 2 of 2" in shown.stderr
