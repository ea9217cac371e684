"""``sharefold sweep`` from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from command_line import call

import sharefold
from sharefold.ownership import network_folder


def test_table_plot_and_networks(grey_npz: str, tmp_path: Path) -> None:
    out = tmp_path / "curve"
    arguments = ["sweep", "timm:digits_resnet:blocks=2,width=16", "--no-pretrained", "--data", grey_npz, "--no-repair"]
    arguments += ["--method", "basis"]
    result = call(*arguments, "--budgets", "40%,60%", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [point["budget"] for point in report["points"]] == ["dense", "40%", "60%"]
    assert report["files"] == ["sweep.csv", "sweep.json", "sweep.svg", "sweep.png"]
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["params"]) for row in rows] == [point["params"] for point in report["points"]]
    assert json.loads((out / "sweep.json").read_text())["points"] == report["points"]
    assert (out / "sweep.svg").read_text().count("<circle") == 2 and (out / "sweep.png").stat().st_size > 5_000
    for point in report["points"][1:]:
        model = sharefold.load(out / point["budget"].replace("%", ""))
        assert sum(p.numel() for p in model.parameters()) == point["params"]
        again = json.loads(call("eval", out / point["budget"].strip("%"), "--data", grey_npz, "--json").stdout)
        assert again["top1"] == pytest.approx(point["top1"])
    text = call(*arguments, "--budgets", "60%, 100% MACs;", "-o", tmp_path / "second", "--no-save", "--limit", 10)
    assert text.exit_code == 0 and "top-1" in text.stdout and "dense" in text.stdout and "60%, 100% MACs" in text.stdout
    assert network_folder("60%, 100% MACs") == "60-100-MACs"
    assert sorted(path.name for path in (tmp_path / "second").iterdir()) == sorted(report["files"])
    refused = call(*arguments, "--budgets", "60%", "-o", out)
    assert refused.exit_code == 2 and "exists" in refused.stderr
    assert call(*arguments, "--budgets", "60%", "-o", out, "--force", "--no-save").exit_code == 0
    assert not (out / "40").exists() and not list(tmp_path.glob(".*"))


def test_refusals_leave_nothing(grey_npz: str, tmp_path: Path) -> None:
    base = ["sweep", "timm:digits_resnet:blocks=2,width=16", "--no-pretrained", "--data", grey_npz, "-o", tmp_path / "out"]
    for more, words in ((["--budgets", "x"], "'x'"), (["--method", "magic"], "magic"), (["--budgets", "0.1%"], "floor")):
        result = call(*base, *more)
        assert result.exit_code == 2 and words in result.stderr
    assert not list(tmp_path.iterdir())
