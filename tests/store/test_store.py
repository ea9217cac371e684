"""The store: files of the size that was said, that read back bit by bit, and rounding that makes up for itself."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sharefold
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.measure import agreement
from sharefold.plans import Plan
from sharefold.store import StoreSpec, fake_quantize, file_bytes, parse_store, plan_store, quantize_, snap_
from sharefold.store.norm_absorption import absorb_statistics, gains_of, take_up
from sharefold.store.prepare import matrices, prepare
from sharefold.store.rounding import round_matrix
from sharefold.store.size import size_predictor
from sharefold.store.specs_for import nearest as nearest_specs
from sharefold.store.tensor_spec import scaled

from .tiny import Tiny, converted, images, trained

EVERY = ["fp16", *(f"int{b}" for b in range(2, 9)), "kmeans2", "kmeans4", "kmeans8", "mixed:step=0.01"]


@pytest.mark.parametrize("text", EVERY)
def test_round_trip_is_bit_equal_and_the_size_is_known(text: str, tmp_path: Path) -> None:
    original, model = converted()
    report = quantize_(model, text, calibration=images(), original=original)
    file = sharefold.save(model, tmp_path / "tiny.safetensors")
    assert report.bytes == file.stat().st_size == file_bytes(model, report.spec)
    loaded = sharefold.load(file, model=Tiny())
    assert torch.equal(loaded(images()), model.eval()(images()))
    again = sharefold.save(loaded, tmp_path / "again.safetensors")
    assert again.stat().st_size == file.stat().st_size
    for name, tensor in load_file(file).items():
        assert torch.equal(load_file(again)[name], tensor)


@pytest.mark.parametrize("step", [0.001, 0.02])
def test_the_size_is_predicted_before_anything_is_rounded(step: float) -> None:
    original, model = converted()
    graph = sharefold.analyze(original, images(1))
    prepared = prepare(original, model, graph, images())
    gains = gains_of(model, graph, matrices(model), Plan([], 0, 0))
    spec = nearest_specs(model, prepared, gains, step)
    predicted = size_predictor(model, gains)(spec)
    absorb_statistics(model, Plan([], 0, 0))
    for gain in gains.values():
        take_up(model, gain)
    snap_(model, spec)
    assert predicted == pytest.approx(file_bytes(model, spec), rel=0.003, abs=16)


def test_more_bytes_never_do_harm() -> None:
    divergences = []
    for budget in (4_000, 6_000, 8_000, 12_000, 60_000):
        original, model = converted()
        report = quantize_(model, f"mixed:{budget}B", calibration=images(), original=original)
        assert report.bytes <= budget
        divergences.append(agreement(converted()[1], model, images()).kl)
    # Rounding fits layers to the original as it goes: however many bytes there are, that much of a difference stays.
    assert divergences[0] < 1e-3 and all(kl <= 1.1 * divergences[0] for kl in divergences[1:])
    assert divergences[-1] < 1e-4, divergences


def test_round_trip_in_a_new_process(tmp_path: Path) -> None:
    original, model = converted()
    quantize_(model, "mixed:step=0.003", calibration=images(), original=original)
    sharefold.save(model, tmp_path / "tiny.safetensors")
    torch.save(model(images(8)).detach(), tmp_path / "here.pt")
    code = (
        "import sys, pickle, torch, sharefold\n"
        "from store.tiny import Tiny, images\n"
        "expected = torch.load('here.pt', weights_only=True)\n"
        "def never(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.load = pickle.loads = pickle.Unpickler = torch.load = never\n"
        "model = sharefold.load('tiny.safetensors', model=Tiny())\n"
        "sys.exit(0 if torch.equal(model(images(8)), expected) else 'differs')\n"
    )
    here = Path(__file__).parents
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{here[2]}{os.pathsep}{here[1]}"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_folder_holds_the_same_bytes_of_weights(tmp_path: Path) -> None:
    _, model = converted()
    quantize_(model, "int4", calibration=images())
    folder = sharefold.save(model, tmp_path / "tiny")
    assert torch.equal(sharefold.load(folder, model=Tiny())(images(4)), model(images(4)))


@pytest.mark.parametrize("text", ["fp16", "int4", "kmeans4", "mixed:step=0.01"])
@pytest.mark.parametrize("alone", ["spatial", "svd"])
def test_pivoted_factors_round_trip(alone: str, text: str, tmp_path: Path) -> None:
    original, model = converted(alone=alone, pivoted=True)
    pivots = {name: t for name, t in model.state_dict().items() if name.endswith("pivots")}
    quantize_(model, text, calibration=images(), original=original)
    loaded = sharefold.load(sharefold.save(model, tmp_path / "tiny.safetensors"), model=Tiny())
    assert torch.equal(loaded(images()), model.eval()(images()))
    assert len(pivots) == 2 and all(torch.equal(loaded.state_dict()[name], t) for name, t in pivots.items())
    assert agreement(original, model, images()).kl < (0.4 if "4" in text else 0.2)


PIVOTED = [{"pivoted": True}, {"alone": "svd", "pivoted": True}]


@pytest.mark.parametrize("form", [{}, {"shared": False}, {"method": "tucker"}, *PIVOTED])
def test_compensation_beats_nearest(form: dict[str, Any]) -> None:
    original, model = converted(**form)
    rounded, nearest = copy.deepcopy(model), copy.deepcopy(model)
    report = quantize_(rounded, "mixed:step=0.02", calibration=images(), original=original)
    assert report.sequential
    prepared = prepare(original, nearest, sharefold.analyze(original, images(1)), images())
    specs = nearest_specs(nearest, prepared, {}, 0.02)
    snap_(nearest, StoreSpec({n: s for n, s in specs.tensors.items() if s.kind == "coded" and "bank" not in n
                              and "coefficients" not in n}))
    assert agreement(original, rounded, images()).kl < 0.7 * agreement(original, nearest, images()).kl


def test_rounding_under_the_data_norm() -> None:
    torch.manual_seed(0)
    matrix, mixing = torch.randn(8, 30), torch.randn(30, 30)
    metric = (mixing @ mixing.T).unsqueeze(0)
    spec = scaled("grid", matrix.abs().amax(1) / 3, 3)

    def error(values: torch.Tensor) -> float:
        gap = matrix - values
        return float(((gap @ metric[0]) * gap).sum())

    compensated = round_matrix(matrix, spec, metric)
    assert error(compensated) < 0.6 * error(round_matrix(matrix, spec, None))
    assert torch.equal(spec.snapped(compensated), compensated)
    # Every conv group has its own moments.
    both = torch.cat([metric, 2 * metric.flip(1, 2)])
    spec2 = scaled("grid", torch.cat([matrix, matrix]).abs().amax(1) / 3, 3)
    two = round_matrix(torch.cat([matrix, matrix]), spec2, both)
    assert torch.equal(two[:8], compensated)
    assert not torch.equal(two[8:], compensated)


def test_smaller_steps_and_more_bits_are_closer() -> None:
    found = {}
    mixed = ("mixed:step=0.05", "mixed:step=0.01", "mixed:step=0.002")
    for text in ("int2", "int4", "int8", "kmeans2", "kmeans4", *mixed):
        original, model = converted(shared=False)
        quantize_(model, text, calibration=images(), original=original)
        found[text] = agreement(original, model, images()).kl
    assert found["int2"] > found["int4"] > found["int8"]
    assert found["kmeans2"] > found["kmeans4"]
    assert found["mixed:step=0.05"] > found["mixed:step=0.01"] > found["mixed:step=0.002"]


def test_budget_is_met_and_used() -> None:
    original, model = converted()
    report = quantize_(model, "mixed:4200B", calibration=images(), original=original)
    assert 0.9 * 4200 < report.bytes <= 4200
    request = plan_store(converted()[1], budget_bytes=4200, calibration=images())
    assert request.step == pytest.approx(report.request.step, rel=0.5)
    with pytest.raises(SharefoldError, match="cannot hold"):
        quantize_(converted()[1], "mixed:900B", calibration=images())


@pytest.mark.parametrize("budget", [1600, 1800, 2400, 3000])
def test_small_budgets_are_met_to_the_byte(budget: int, tmp_path: Path) -> None:
    """Near the floor more steps have to be tried than elsewhere; measurements that come later do not enlarge the file."""
    original, model = converted()
    report = quantize_(model, f"mixed:{budget}B", calibration=images(), original=original)
    file = sharefold.save(model, tmp_path / "net.safetensors", metrics={"note": "measured " * 9})
    assert 0.9 * budget < file.stat().st_size == report.bytes <= budget
    folder = sharefold.save(model, tmp_path / "net", metrics={"note": "measured"})
    assert (folder / "model.safetensors").stat().st_size == report.bytes
    assert sharefold.load(folder, model=trained()).sharefold_config.metrics["note"] == "measured"


def test_the_modes_of_the_network_change_nothing_and_come_back() -> None:
    results = []
    for training in (False, True):
        original, model = converted()
        model.train(training)
        model.blocks[0].bn1.eval()
        modes = [module.training for module in model.modules()]
        quantize_(model, "mixed:4200B", calibration=images(), original=original)
        assert [module.training for module in model.modules()] == modes
        results.append(model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("method", ["basis", "tucker"])
def test_bases_are_turned_without_changing_the_network(method: str) -> None:
    from sharefold.graph import analyze

    original, model = converted(method=method)
    before = model(images())
    prepared = prepare(original, model, analyze(original, images(1)), images())
    assert torch.allclose(model(images()), before, atol=1e-4)
    basis = next(p for n, p in model.named_parameters() if n.endswith(".basis")).flatten(1).double()
    metric = next(metric for name, metric in prepared.metrics.items() if name.endswith(".basis"))[0]
    assert torch.allclose(basis @ metric @ basis.T, torch.eye(10, dtype=torch.float64), atol=1e-3)


def test_training_under_rounding() -> None:
    original, model = converted(shared=False)
    report = quantize_(model, "int2", calibration=images(), original=original)
    target = original(images()).detach()
    _, model = converted(shared=False)  # rounded to the nearest: a start that can be improved on
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    with fake_quantize(model, report.spec):
        for _ in range(80):
            assert report.spec.fits(dict(model.state_dict()))
            loss = nn.functional.mse_loss(model(images()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert report.spec.fits(dict(model.state_dict()))
    # Rounding makes single steps jump: compare with the mean of the last ones.
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0], losses


def test_changed_weights_are_not_lost(tmp_path: Path) -> None:
    _, model = converted()
    quantize_(model, "int4", calibration=images())
    with torch.no_grad():
        model.head.weight.add_(0.01234)
    with pytest.warns(SharefoldWarning, match="round them again"):
        file = sharefold.save(model, tmp_path / "tiny.safetensors")
    assert torch.equal(sharefold.load(file, model=Tiny())(images(4)), model(images(4)))


@pytest.mark.parametrize("keep", [0, 5, 20, 300, -1])
def test_truncated_weights_are_refused(keep: int, tmp_path: Path) -> None:
    _, model = converted()
    quantize_(model, "mixed:step=0.01", calibration=images())
    file = sharefold.save(model, tmp_path / "tiny.safetensors")
    from safetensors import safe_open

    with safe_open(str(file), "pt") as handle:
        metadata = handle.metadata()
    blob = load_file(file)["blob"]
    save_file({"blob": blob[:keep].clone()}, tmp_path / "cut.safetensors", metadata)
    with pytest.raises(SharefoldError, match="damaged"):
        sharefold.load(tmp_path / "cut.safetensors", model=Tiny())
    flipped = blob.clone()
    flipped[len(blob) // 2] ^= 4
    save_file({"blob": flipped}, tmp_path / "flip.safetensors", metadata)
    with pytest.raises(SharefoldError, match="damaged"):
        sharefold.load(tmp_path / "flip.safetensors", model=Tiny())


@pytest.mark.parametrize("text", ["int1", "int9", "int", "kmeans", "mixed:", "mixed:50%", "mixed:step=2", "zip", ""])
def test_unknown_specs(text: str) -> None:
    with pytest.raises(SharefoldError):
        parse_store(text)


def test_dense_networks_are_refused_and_small_files_are_small() -> None:
    with pytest.raises(SharefoldError, match="convert it first"):
        quantize_(Tiny(), "int4", calibration=images())
    sizes = {}
    for text in ("fp16", "int8", "int4", "int2"):
        model = converted()[1]
        sizes[text] = quantize_(model, text, calibration=images()).bytes
    assert sizes["fp16"] > sizes["int8"] > sizes["int4"] > sizes["int2"]
    raw = sum(t.numel() * t.element_size() for t in converted()[1].state_dict().values())
    assert sizes["fp16"] < raw / 1.6


class Tied(nn.Module):
    """Two convolutions that share a weight, each with a norm of its own, and a layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem, self.one, self.two = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, bias=False), nn.Conv2d(12, 12, 3, bias=False)
        self.two.weight = self.one.weight
        self.norm_one, self.norm_two, self.head = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.Linear(12, 5)
        self.again = self.stem
        for norm in (self.norm_one, self.norm_two):
            nn.init.uniform_(norm.weight, 0.5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm_one(self.one(self.again(x))).relu()
        return self.head(self.norm_two(self.two(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", ["int4", "kmeans4", "mixed:2200B", "fp16"])
def test_tied_tensors_are_rounded_once(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = Tied().eval().to(dtype), images(60).to(dtype)
    before = model(x).float()
    sharefold.convert_(model, Plan([], 0, 0, store=text), x)
    assert model.two.weight is model.one.weight and model.again is model.stem
    file = sharefold.save(model, tmp_path / "net.safetensors")
    assert "mixed" not in text or file.stat().st_size <= 2200
    again = sharefold.load(file, model=Tied().to(dtype)).eval()
    assert torch.equal(again(x), model(x))
    spread = (before - before.mean(0)).norm()
    assert float((model(x).float() - before).norm() / spread) < (0.35 if dtype == torch.float32 else 0.5)


def test_a_tied_tensor_that_is_protected_under_one_name_stays_as_it_is() -> None:
    for name in ("^one$", "^two$"):
        model = Tied().eval()
        weight = model.one.weight.detach().clone()
        sharefold.convert_(model, Plan([], 0, 0, store="int3", exclude=name), images(60))
        assert torch.equal(model.one.weight, weight) and not torch.equal(model.stem.weight, Tied().stem.weight)
    model = Tied().eval()
    sharefold.convert_(model, Plan([], 0, 0, store="int3", exclude="^again$"), images(60))
    assert torch.equal(model.stem.weight, Tied().stem.weight) and not torch.equal(model.one.weight, Tied().one.weight)
