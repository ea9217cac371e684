"""The arithmetic of benchmarks/runtime.py, and its committed result."""

from __future__ import annotations

import json

import pytest
import torch
from doc_blocks import ROOT
from script_loader import load_script

from sharefold.layers import ConvForm

runtime = load_script("benchmarks/runtime.py", "runtime_benchmark")


def test_regret_by_hand() -> None:
    rows = [{"share": 0.4, "ratio": 0.5}, {"share": 0.8, "ratio": 1.25}]
    assert runtime.regret(rows, 0.3) == pytest.approx((1 / 0.5 - 1) / 2)
    assert runtime.regret(rows, 0.5) == 0
    assert runtime.regret(rows, 0.9) == pytest.approx(0.25 / 2)
    assert 0.4 <= runtime.summary(rows)["threshold"] < 0.8


def test_layers_cost_about_the_share_asked_for() -> None:
    form = ConvForm("conv2d", 64, 64, (3, 3), (1, 1), (1, 1))
    for share in (0.3, 0.8):
        for layer in runtime.layers(form, share).values():
            assert layer.factored_share() == pytest.approx(share, abs=0.02)
    row = runtime.timed(runtime.layers(form, 0.3)["basis"], torch.randn(1, 64, 8, 8), repeats=2)
    assert row["ratio"] > 0 and row["share"] == pytest.approx(0.3, abs=0.02)


def test_the_committed_result_follows_from_its_rows() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "runtime.json").read_text())
    assert results
    for device in results.values():
        for name in ("all", "basis", "spatial"):
            rows = [row for row in device["layers"] if name in ("all", row["kind"])]
            wanted = runtime.summary(rows)
            assert {key: device[name][key] for key in ("threshold", "regret", "by_share")} == {
                key: wanted[key] for key in ("threshold", "regret", "by_share")
            }
