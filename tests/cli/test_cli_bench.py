"""``sharefold bench`` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call

NET = "timm:digits_resnet:blocks=3,width=16"


def test_a_shared_network_against_its_dense_twin(shared_digits: Path) -> None:
    result = call("bench", shared_digits, "--batch", 2, "--repeats", 3, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["batch"] == 2 and report["threads"] == 1 and report["against"] == "its dense twin"
    assert set(report["latency"]) == {"against", "composed", "factored", "auto"}
    assert report["latency"]["against"]["ratio"] == 1
    for name, timing in report["latency"].items():
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert report["throughput"][name] == pytest.approx(2 / timing["median"])
    assert report["params"]["source"] <= 0.5 * report["params"]["against"]
    assert report["file_bytes"]["source"] < report["file_bytes"]["against"]
    assert report["load_seconds"]["source"] > 0 and report["peak_tensor_bytes"]["source"] > report["bytes"]["source"]
    assert report["form"]["runs"] == "auto" and report["form"]["layers"] and report["form"]["explanation"]


def test_text_names_the_conditions(shared_digits: Path) -> None:
    result = call("bench", shared_digits, "--repeats", 2, "--no-layers", "--threads", 1)
    assert result.exit_code == 0
    for words in ("batch 1, 1 thread, input 1x8x8, 2 rounds", "images/s", "load ms", "peak tensors MB", "faster form"):
        assert words in result.stdout
    assert "factored / composed" not in result.stdout


def test_dense_alone_and_two_sources(shared_digits: Path) -> None:
    alone = json.loads(call("bench", NET, "--no-pretrained", "--repeats", 2, "--json").stdout)
    assert set(alone["latency"]) == {"source"} and alone["against"] is None and alone["form"]["runs"] is None
    other = "timm:digits_resnet:width=8"
    both = json.loads(call("bench", shared_digits, "--against", other, "--no-pretrained", "--repeats", 2, "--json").stdout)
    assert both["against"] == other and both["file_bytes"] == {"source": None, "against": None}
    refused = call("bench", shared_digits, "--against", "nothing-here")
    assert refused.exit_code == 2 and "nothing-here" in refused.stderr
