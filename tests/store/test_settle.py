"""After rounding the logits get the scale of least divergence, and every tensor stays what the file can hold."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sharefold
from sharefold.calibration.calibrate import Calibration
from sharefold.plans import Plan
from sharefold.repair.guard import Guard
from sharefold.repair.work import Work
from sharefold.store import StoreReport, quantize_, settle
from sharefold.store.settle import rescale_, settle_rounded
from sharefold.store.tensor_spec import carried_spec

from .tiny import Tiny, images, trained

KINDS = ["fp16", "int8", "int3", "kmeans3", "mixed:step=0.02"]


def rounded(text: str, original: nn.Module) -> tuple[Work, StoreReport]:
    """A rounded network whose logits are then made smaller than the original's."""
    model = copy.deepcopy(original)
    cal = sharefold.calibrate(original, images(240))
    plan = Plan([], 0, 0)
    sharefold.convert_(model, plan, cal, repair=False)
    report = quantize_(model, text, cal)
    report.spec = rescale_(model, report.spec, "head", 0.6)
    return Work(cal, model, plan, Guard(cal.decided), cal), report


def codes_of(model: nn.Module, report: StoreReport) -> dict[str, Tensor]:
    state, scaled = model.state_dict(), {name: entry for name, entry in report.spec.tensors.items() if entry.scales}
    return {name: entry.codes(state[name].reshape(len(entry.scales), -1)) for name, entry in scaled.items()}


@pytest.mark.parametrize("text", KINDS)
def test_the_scale_is_found_and_all_stays_on_its_grid(text: str, tmp_path: Path) -> None:
    work, report = rounded(text, trained())
    before = codes_of(work.model, report)
    damaged = work.guard.divergence(work.model)
    factors = settle_rounded(work, report)
    assert factors == {"output": pytest.approx(1 / 0.6, rel=0.15)}
    assert work.guard.divergence(work.model) < 0.8 * damaged
    assert report.spec.fits(work.model.state_dict()) and carried_spec(work.model) is report.spec
    after = codes_of(work.model, report)
    assert before.keys() == after.keys() and all(torch.equal(before[name], codes) for name, codes in after.items())
    file = sharefold.save(work.model, tmp_path / "net.safetensors")
    assert file.stat().st_size == report.bytes
    assert torch.equal(sharefold.load(file, model=Tiny())(images()), work.model(images()))


def test_a_file_that_would_grow_beyond_its_budget_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    work, report = rounded("mixed:6000B", trained())
    spec, state = report.spec, {name: tensor.clone() for name, tensor in work.model.state_dict().items()}
    size = report.bytes
    monkeypatch.setattr(settle, "file_bytes", lambda model, spec: 6001)
    assert settle_rounded(work, report) == {}
    assert report.spec is spec and report.bytes == size
    assert all(torch.equal(state[name], tensor) for name, tensor in work.model.state_dict().items())


def test_conversions_tell_the_factor(tmp_path: Path) -> None:
    model = trained()
    done = sharefold.convert_(model, Plan([], 0, 0, store="int2"), images(240))
    record = done.steps["store"].to_dict()
    assert set(record["factors"]) == {"output"} and 1 < record["factors"]["output"] < 1.1
    assert sharefold.save(model, tmp_path / "net.safetensors").stat().st_size == record["file_bytes"]


def test_networks_without_logits_are_left_alone() -> None:
    cal: Calibration = sharefold.calibrate(trained(), images(240), outputs=("regression",))
    model = trained()
    done = sharefold.convert_(model, Plan([], 0, 0, store="int3"), cal)
    assert "factors" not in done.steps["store"].to_dict()


def test_nothing_is_scaled_where_it_brings_nothing() -> None:
    """Few images to decide by, a factor that rounding cannot be the reason for, and logits that are as they should be."""
    model = trained()
    done = sharefold.convert_(model, Plan([], 0, 0, store="int3"), images(80))
    assert len(sharefold.calibrate(trained(), images(80)).parts.decide) < settle.FEWEST
    assert "factors" not in done.steps["store"].to_dict()
    work, report = rounded("int8", trained())
    report.spec = rescale_(work.model, report.spec, "head", 0.1)
    before = work.model.head.weight.clone()
    assert settle_rounded(work, report) == {} and torch.equal(work.model.head.weight, before)
    sure = trained()
    with torch.no_grad():
        sure.head.weight.mul_(1e4), sure.head.bias.add_(3e4)
    for store in ("fp16", "int8"):
        model = copy.deepcopy(sure)
        sharefold.convert_(model, Plan([], 0, 0, store=store), images(240))
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        found, wanted = model(images()), sure(images())
        assert float((found - wanted).norm() / wanted.norm()) < 0.02
