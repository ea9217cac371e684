"""One architecture of every family through ONNX, as benchmarks/onnx_families.py runs it, and that script's table."""

from __future__ import annotations

import copy

import pytest
import torch
from script_loader import load_script
from torch import nn

from sharefold.layers import Bank, BasisConv, add_bank, form_of
from sharefold.options import ExportOptions

table = load_script("benchmarks/architectures.py")
load_script("benchmarks/coverage_blank.py")
load_script("benchmarks/coverage_check.py")
families = load_script("benchmarks/onnx_families.py", "onnx_families")


def test_every_family_has_a_passing_row() -> None:
    rows = table.read(families.RESULTS)
    asked = families.representatives()
    assert len(asked) > 100 and {(row.library, row.model) for row in asked} == set(rows)
    converted = [row for row in table.read(families.COVERAGE).values() if row["reduced_to"]]
    of_ours = {(row["library"], row["family"]) for row in converted if row["library"] in families.LIBRARIES}
    assert {(row.library, row.family) for row in asked} == of_ours
    for row in rows.values():
        if row["reason"]:
            assert row["reason"].startswith(("too large", "detection")), row
        else:
            assert float(row["difference"]) <= ExportOptions.tolerance * max(1.0, float(row["largest"])), row
            assert float(row["size_ratio"]) <= 1.1, row


def test_every_family_of_segmentation_models_passes() -> None:
    rows = table.read(families.RESULTS.with_name("onnx_smp.csv"))
    asked = families.representatives(libraries=["smp"])
    assert len(asked) > 10 and {(row.library, row.model) for row in asked} == set(rows)
    for row in rows.values():
        assert not row["reason"] and float(row["size_ratio"]) <= 1.1, row
        assert float(row["difference"]) <= ExportOptions.tolerance * max(1.0, float(row["largest"])), row


def test_a_small_network_passes_for_real() -> None:
    row = families.check_export(families.representatives("^digits_resnet$")[0], 3_000_000)
    assert (row.reason, row.mode) == ("", "real")
    assert row.difference < 1e-4 and 0.5 < row.size_ratio < 1.1 and row.largest > 0.01


def test_blank_layers_are_filled_and_failures_become_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    row = families.check_export(families.representatives("^digits_resnet$")[0], 1000)
    assert (row.reason, row.mode) == ("", "random") and row.difference < 1e-4
    monkeypatch.setattr(families, "LARGER_FILE", 0.1)
    assert families.check_export(row, 1000).reason.startswith("failed: AssertionError: the file is 1.0")
    monkeypatch.setattr(families, "LARGEST", 1000)
    assert families.check_export(row, 1000).reason.startswith("too large: ")


def test_filled_layers_have_unit_gain() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    model = nn.Sequential(conv)
    bank = add_bank(model, "group", Bank({"basis": torch.empty(32, 64, 3, 3)}, uses=1))
    model[0] = BasisConv(form_of(conv), torch.empty(64, 32), bank)
    families.fill(model)
    with torch.no_grad():
        gain = model[0](torch.randn(2, 64, 16, 16)).var()
    assert 0.5 < float(gain) < 2


@pytest.mark.sweep
@pytest.mark.parametrize("row", families.representatives(), ids=lambda row: f"{row.library}-{row.model}")
def test_family_through_onnx(row: object) -> None:
    found = families.check_export(copy.copy(row), 3_000_000)
    assert not found.reason.startswith("failed"), found.reason
