"""Refinement under rounding: nearer to the original, on its grids, in a file of the size that was asked for."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import reported
from torch import Tensor, nn

import sharefold
from sharefold.budget import Effort
from sharefold.calibration.calibrate import Calibration
from sharefold.data import Preprocess, calibration_images
from sharefold.options import RefineOptions
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.guard import Guard
from sharefold.repair.work import Work
from sharefold.store import StoreReport, file_bytes, quantize_
from sharefold.store import trained_codes as module
from sharefold.store.refine_codes import NAME, efforts, refine_codes
from sharefold.store.tensor_spec import TensorSpec, carried_spec
from sharefold.store.trained_codes import TrainedCodes

from .tiny import images, trained

BANK = GroupPlan("first", "basis", ("blocks.0.conv1", "blocks.1.conv1"), {"rank": 10}, 2592, 1320)


def rounded(store: str, plan: Plan | None = None) -> tuple[Work, StoreReport]:
    model, plan = trained(), Plan([], 0, 0) if plan is None else plan
    cal = sharefold.calibrate(trained(), images(240))
    sharefold.convert_(model, plan, cal, repair=False)
    report = quantize_(model, store, cal)
    return Work(cal, model, plan, Guard(cal.decided), cal), report


@pytest.fixture(scope="module")
def digits() -> Calibration:
    """Of a network that knows something: random ones say the same whatever is done to them."""
    source = sharefold.open_source("timm:digits_resnet")
    given = calibration_images("digits", Preprocess.from_cfg(source.pretrained_cfg), 300, 0)
    return sharefold.calibrate(source.model, given)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("store", "shared"), [("mixed:step=0.006", True), ("kmeans2", False)])
def test_nearer_to_the_original_on_the_same_grids(store: str, shared: bool, digits: Calibration, tmp_path: Path) -> None:
    model = copy.deepcopy(digits.original)
    bank = GroupPlan("layer2", "basis", ("layer2.1.conv1", "layer2.2.conv1"), {"rank": 40}, 41472, 21120)
    plan = Plan([bank] if shared else [], 0, 0)
    sharefold.convert_(model, plan, digits, repair=False)
    report = quantize_(model, store, digits)
    work = Work(digits, model, plan, Guard(digits.decided), digits)
    before, size = work.guard.divergence(model), report.bytes
    record = refine_codes(work, report, RefineOptions(epochs=8))
    assert record.kept and record.name == NAME and record.kl_before == pytest.approx(before)
    assert record.kl_after == pytest.approx(work.guard.divergence(model)) and record.kl_after < 0.85 * before
    assert 0 < record["changed"] < 0.1 and record["epochs"] == 8
    assert report.spec.fits(model.state_dict()) and carried_spec(model) is report.spec
    assert report.bytes == file_bytes(model, report.spec) <= size * (1.02 if store.startswith("kmeans") else 1)
    sharefold.save(model, tmp_path / "net.safetensors")
    saved = sharefold.load(tmp_path / "net.safetensors")
    assert torch.equal(saved(digits.images[:8]), model(digits.images[:8]))


@pytest.mark.parametrize("how", ["worse", "no longer finite", "interrupted"])
def test_what_does_not_help_is_undone(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work, report = rounded("mixed:3500B")
    before, spec, size = state(work.model), report.spec, report.bytes
    step = 30.0 if how == "worse" else 0.004
    if how == "no longer finite":
        monkeypatch.setattr(module.TrainedCodes, "show", lambda codes: codes.model.head.bias.data.fill_(torch.nan))
    if how == "interrupted":
        monkeypatch.setattr(module.TrainedCodes, "epoch_ends", lambda codes: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            refine_codes(work, report, RefineOptions(epochs=2, batch_size=16, step=step))
    else:
        record = refine_codes(work, report, RefineOptions(epochs=2, batch_size=16, step=step))
        assert not record.kept and work.guard.current(work.model) == record.kl_before
    assert report.spec is spec and report.bytes == size and carried_spec(work.model) is spec
    after = state(work.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and p.grad is None for p in work.model.parameters())


def test_positions_start_where_values_were_rounded() -> None:
    work, report = rounded("int2")
    codes = TrainedCodes(work.model, report)
    before = state(work.model)
    moved = [(rows.position.detach() - rows.first)[rows.first == 0].abs() for rows in codes.rows.values()]
    assert all(float(far.max()) <= 0.5 + 1e-6 for far in moved)
    assert min(float(far.mean()) for far in moved) > 0.1, "they start at the codes"
    codes.show()
    assert all(torch.equal(before[name], tensor) for name, tensor in state(work.model).items())
    assert codes.changed() == 0
    with torch.no_grad():
        work.model.stem.weight.copy_(report.spec.tensors["stem.weight"].snapped(-work.model.stem.weight))
    other = TrainedCodes(work.model, report).rows["stem.weight"]
    flipped = other.first != 0
    assert torch.equal(other.position[flipped], other.first[flipped]), "of what has changed since, the value is all that is known"


def row(values: list[float], entry: TensorSpec) -> module._Rows:
    codes = entry.nearest(torch.tensor([values]))
    return module._Rows(codes * entry.row_scales(), entry, torch.tensor([values]))


def test_what_is_dropped_is_what_the_loss_feels_least() -> None:
    rows = row([0.2, 0.6, -0.55, 1.7, -1.2], TensorSpec("coded", 0, 0.25, [0]))
    assert rows.nearest().tolist() == [[0, 1, -1, 2, -1]]
    tensor = nn.Parameter(rows.first * rows.scale())
    tensor.grad = torch.tensor([[9.0, 2.0, -3.0, 1.0, 0.5]])
    with torch.no_grad():
        rows.take(tensor, 0.0)
    assert rows.position.grad is not None and torch.equal(rows.position.grad, 0.25 * tensor.grad)
    costs = rows.costs().flatten()
    assert costs.isinf().tolist() == [True, False, False, True, False] and costs[4] < costs[1] < costs[2]
    with torch.no_grad():
        rows.drop(float(costs[1]))
    assert rows.nearest().tolist() == [[0, 0, -1, 2, 0]]
    with torch.no_grad():
        rows.drop(float("inf"))
    assert rows.nearest().tolist() == [[0, 0, 0, 2, 0]]


def test_gains_move_rows_along_the_grid_of_the_file() -> None:
    entry = TensorSpec("coded", 0, 0.25, [0, 16, 255])
    rows = module._Rows(torch.ones(3, 4) * entry.row_scales(), entry, None)
    assert rows.stored() == entry and torch.equal(rows.scale(), entry.row_scales())
    octave = float(torch.tensor(2.0).log()) / 16
    rows.gain.data = torch.tensor([[0.4], [2.0], [0.0]]) * octave
    assert rows.stored() == TensorSpec("coded", 0, 0.25, [0, 14, 255]), "less than half a place is none"
    rows.gain.data = torch.tensor([[3.0], [0.0], [-2.0]]) * octave
    found = rows.stored()
    assert found.scales == [0, 19, 255] and found.top == pytest.approx(0.25 * 2 ** (3 / 16))
    assert torch.allclose(found.row_scales()[:2], rows.scale()[:2], rtol=1e-6)


def test_the_penalty_follows_the_size_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    work, report = rounded("mixed:3500B")
    codes = TrainedCodes(work.model, report)
    sizes = iter([4000, 4000, 3000, 2000])
    monkeypatch.setattr(module, "file_bytes", lambda model, spec: next(sizes))
    penalties = [codes.penalty]
    for _ in range(4):
        codes.epoch_ends()
        penalties.append(codes.penalty)
    assert penalties[0] == 0 < penalties[1] < penalties[2] > penalties[3] >= penalties[4] >= 0
    free = TrainedCodes(*[(part.model if isinstance(part, Work) else part) for part in rounded("int2")])
    assert free.limit is None and free.penalty == 0


def test_a_file_that_has_grown_is_cut_to_its_limit_by_few_codes() -> None:
    work, report = rounded("mixed:step=0.05")
    codes = TrainedCodes(work.model, report)
    codes.limit = int(0.9 * report.bytes)
    for rows in codes.rows.values():
        rows.mean_square.uniform_()
    spec = codes.settled()
    assert spec is not None and 0.8 * report.bytes < file_bytes(work.model, spec) <= codes.limit
    assert 0 < codes.changed() < 0.4 and spec.fits(work.model.state_dict())
    codes.limit = 10
    assert codes.settled() is None


def test_conversions_refine_what_they_rounded() -> None:
    model = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error", sharefold.SharefoldWarning)
        done = sharefold.convert_(model, Plan([], 0, 0, store="int2"), images(240), refine=6)
    assert list(done.steps)[-2:] == ["store", NAME] and done.steps[NAME]["epochs"] == 6
    assert done.steps[NAME].kl_before == done.steps["store"].kl_after
    assert done.seconds[NAME] > 0 and "refine" not in done.seconds
    shared = trained()
    done = sharefold.convert_(shared, Plan([BANK], 0, 0, store="int3"), images(240), refine=6)
    assert [done.steps[name]["epochs"] for name in ("refine", NAME)] == [3, 3]
    again = trained()
    done = sharefold.convert_(again, Plan([BANK], 0, 0, store="int8"), images(240), refine=6)
    assert NAME not in done.steps and done.steps["refine"]["epochs"] == 6


@pytest.mark.parametrize(
    ("effort", "store", "groups", "wanted"),
    [
        (None, "int2", [BANK], (None, None)),
        (Effort(5), None, [BANK], (Effort(5), None)),
        (Effort(5), "fp16", [BANK], (Effort(5), None)),
        (Effort(5), "mixed:1MB", [], (None, Effort(5))),
        (Effort(5, 60.0), "kmeans4", [BANK], (Effort(2, 30.0), Effort(3, 30.0))),
        (Effort(1), "kmeans4", [BANK], (None, Effort(1))),
        (Effort(), "int4", [BANK], (Effort(None, 105.0), Effort(None, 105.0))),
        (Effort(), "int4", [], (None, Effort())),
    ],
)  # fmt: skip
def test_how_an_effort_is_spent(effort: Any, store: str | None, groups: list[GroupPlan], wanted: Any) -> None:
    assert efforts(effort, Plan(copy.copy(groups), 0, 0, store=store)) == wanted


def test_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    options = ("--calib", "digits", "--calib-count", "200", "--refine", "2", "--no-pretrained", "-o", out)
    told = reported("convert", "timm:digits_resnet:blocks=1,width=8", "--budget", "8kB", *options)
    step = told["steps"][NAME]
    assert out.stat().st_size <= 8000 and step["epochs"] == 2
    assert not step["kept"] or step["kl_after"] < step["kl_before"]
