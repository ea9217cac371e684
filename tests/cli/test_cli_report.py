"""``sharefold report`` from the command line."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from command_line import call

NET = "timm:digits_resnet:blocks=3,width=16"
FAST = ["--no-pretrained", "--calib-count", 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``net``, a converted network, and ``plan.json``, the plan that a dry run printed."""
    place = tmp_path_factory.mktemp("report")
    result = call("convert", NET, *FAST, "--no-repair", "--method", "basis,svd", "--budget", "50%", "-o", place / "net")
    assert result.exit_code == 0, result.output
    result = call("convert", NET, *FAST, "--method", "basis,svd", "--budget", "50%", "--dry-run", "--json")
    (place / "plan.json").write_text(result.stdout)
    return place


def test_a_page_about_a_converted_network(folder: Path, tmp_path: Path) -> None:
    target, side = tmp_path / "page.html", folder / "net" / "sharefold_config.json"
    config = json.loads(side.read_text())
    assert config["metrics"]["agreement"] is None  # of too few images
    config["metrics"]["agreement"] = 0.9751
    side.write_text(json.dumps(config))
    result = call("report", folder / "net", "-o", target, "--png", tmp_path / "png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["groups"] == len(config["plan"]["groups"]) == report["spectra"] and report["layers"] == 14
    document = target.read_text()
    assert report["bytes"] == target.stat().st_size == len(document.encode())
    assert f"{config['plan']['params_after']:,}" in document and "digits_resnet, shared" in document
    assert "97.51%" in document and "These are the shared weights" in document
    assert [Path(path).name for path in report["png"]] == ["map.png", "groups.png", "spectra.png"]
    assert all(Path(path).stat().st_size > 5_000 for path in report["png"])
    again = call("report", folder / "net", "-o", target)
    assert again.exit_code == 2 and "--force" in again.stderr


def test_a_page_about_a_network_that_was_only_rounded(tmp_path: Path) -> None:
    assert call("convert", NET, *FAST, "--no-repair", "--budget", "45kB", "-o", tmp_path / "net").exit_code == 0
    assert call("report", tmp_path / "net", "-o", tmp_path / "page.html").exit_code == 0
    document = (tmp_path / "page.html").read_text()
    assert "14 of 14 layers are in no group" in document and "Weights are stored rounded (mixed:45000B)." in document


def test_a_page_about_a_plan(folder: Path, tmp_path: Path) -> None:
    report = json.loads(call("report", folder / "plan.json", "-o", tmp_path / "a.html", "--json").stdout)
    assert report["layers"] == 14 and report["spectra"] == 0 and report["png"] == []
    result = call("report", folder / "plan.json", "-o", tmp_path / "b.html", "--source", folder / "net")
    assert result.exit_code == 2 and "shared already" in result.stderr
    bare = json.loads((folder / "plan.json").read_text())["plan"]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    text = call("report", tmp_path / "bare.json", "-o", tmp_path / "c.html")
    assert text.exit_code == 0 and "no map" in text.stdout and 'class="map"' not in (tmp_path / "c.html").read_text()


def test_the_network_that_a_plan_names_costs_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3.3 GB of classes, and the same map as of the built network."""
    built: list[bool] = []
    monkeypatch.setattr("sharefold.sources.opening.build_base", lambda base: built.append(True))
    data = json.loads((folder / "plan.json").read_text())
    large = "num_classes=400000"
    for source, layers in ((f"{NET},{large}", 14), (f"timm:resnet18:{large}", 21), ("tv:regnet_y_400mf", 86)):
        data.update(source=source)
        data["plan"]["groups"] = data["plan"]["groups"] if source.startswith(NET) else []
        (tmp_path / "plan.json").write_text(json.dumps(data))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        done = call("report", tmp_path / "plan.json", "-o", tmp_path / "a.html", "--force", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["layers"] == layers
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert not built


def test_a_network_that_can_not_be_followed_without_values_has_no_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def values(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x

    monkeypatch.setattr("sharefold.models.digits_resnet.DigitsResNet.forward", values)
    (tmp_path / "plan.json").write_text(json.dumps({"source": "timm:digits_resnet", "plan": {"groups": []}}))
    done = call("report", tmp_path / "plan.json", "-o", tmp_path / "a.html")
    assert done.exit_code == 0 and "no map" in done.stdout, done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "-o", "a.html"], "does not exist"),
        (["bad.json", "-o", "a.html"], "is not JSON"),
        (["empty.json", "-o", "a.html"], "no list of groups"),
        (["bad.json", "-o", "a.pdf"], "ends in .html"),
        (["empty.json", "-o", "a.html", "--arch", "net.py:Net"], "--arch is for the network of --source"),
        (["empty.json", "-o", "a.html", "--data", "tensors:x.npz"], "--data is for the network of --source"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "empty.json").write_text("{}")
    result = call("report", *arguments)
    assert result.exit_code == 2 and words in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.json", "empty.json"]
