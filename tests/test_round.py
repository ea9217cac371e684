"""Networks that are rounded after they were converted and trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from command_line import call, refused, reported
from networks import images, net
from torch import nn

import sharefold
from sharefold.checkpoint import read_config
from sharefold.errors import SharefoldError
from sharefold.finetune import finetune
from sharefold.format import config_of
from sharefold.options import RoundOptions
from sharefold.repair.step_record import measured_on
from sharefold.round import store_of

IMAGES = images(240)


@pytest.fixture(scope="module")
def tuned() -> nn.Module:
    model = net("residual", blocks=2)
    cal = sharefold.calibrate(model, IMAGES)
    original = copy.deepcopy(model)
    sharefold.convert_(model, sharefold.plan(model, "60%", cal, method=("hybrid", "fold", "svd")), cal)
    data = torch.randint(0, 255, (64, 3, 32, 32), dtype=torch.uint8)
    finetune(model, data, teacher=original, labels=False, epochs=1, batch_size=16, lr=1e-3, quiet=True, device="cpu")
    return model.eval()


@pytest.mark.parametrize("store", ["8kB", "mixed:8kB", "int8", "int4", "kmeans4", "fp16"])
def test_the_file_is_small_and_holds_what_the_figures_speak_of(tuned: nn.Module, store: str, tmp_path: Path) -> None:
    model = copy.deepcopy(tuned)
    done = sharefold.round_(model, store, IMAGES)
    sharefold.save(tuned, tmp_path / "before.safetensors")
    sharefold.save(model, tmp_path / "after.safetensors")
    before, after = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("before", "after"))
    assert after <= (8_000 if "8kB" in store else 0.7 * before)
    again = sharefold.load(tmp_path / "after.safetensors", model=net("residual", blocks=2)).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)
        same = (model(IMAGES).argmax(1) == tuned(IMAGES).argmax(1)).float().mean()
        torch.testing.assert_close(done.original(IMAGES), tuned(IMAGES), rtol=1e-4, atol=1e-4)
    assert list(done.steps) == ["round"] and done.report_images >= 50 and abs(done.agreement - float(same)) < 0.15
    assert done.plan.store == config_of(again).plan.store == store_of(store)
    assert done.plan.groups == config_of(tuned).plan.groups and done.plan.groups


@pytest.mark.parametrize("size", [7_000, 8_500, 10_001])
def test_a_size_is_kept_to_the_byte(tuned: nn.Module, size: int, tmp_path: Path) -> None:
    model = copy.deepcopy(tuned)
    sharefold.round_(model, f"{size}B", IMAGES)
    assert 0.9 * size < sharefold.save(model, tmp_path / "after.safetensors").stat().st_size <= size
    with pytest.raises(SharefoldError, match="the store must be a text such as int8 or 60kB, not 8000"):
        sharefold.round_(model, 8000, IMAGES)  # type: ignore[arg-type]


def test_codes_are_refined_on_request(tuned: nn.Module, tmp_path: Path) -> None:
    model = copy.deepcopy(tuned)
    done = sharefold.round_(model, "5kB", IMAGES, refine=3)
    assert list(done.steps) == ["round", "refine codes"] == [step.name for step in config_of(model).steps]
    step = done.steps["refine codes"]
    assert step["epochs"] == 3 and step.kl_before == done.steps["round"].kl_after
    assert (not step.kept or step.kl_after < step.kl_before) and "before it was rounded" in measured_on(list(done.steps.values()))
    sharefold.save(model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size <= 5_000
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    for store in ("int8", "fp16"):
        with pytest.raises(SharefoldError, match=f"{store} is next to exact"):
            sharefold.round_(tuned, store, IMAGES, RoundOptions(refine=3))
    with pytest.raises(TypeError, match="did you mean refine"):
        sharefold.round_(tuned, "5kB", IMAGES, refin=3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())


def test_it_can_be_rounded_again_to_another_size(tuned: nn.Module, tmp_path: Path) -> None:
    model, sizes = copy.deepcopy(tuned), []
    for store in ("int8", "7kB"):
        sharefold.round_(model, store, IMAGES)
        sharefold.save(model, tmp_path / f"{store}.safetensors")
        sizes.append((tmp_path / f"{store}.safetensors").stat().st_size)
    assert sizes[1] <= 7_000 < sizes[0]
    assert [step.name for step in config_of(model).steps] == ["round"]


def test_what_cannot_be_rounded_is_told_and_stays_as_it_was(tuned: nn.Module) -> None:
    dense = net("residual", blocks=2)
    cases: list[tuple[nn.Module, str, str]] = [
        (dense, "int8", "not a sharefold network"), (tuned, "int99", "int99"), (tuned, "60%", "no size of a file: write 60kB"),
        (tuned, "100B", "bytes"), (tuned, "", "store"),
    ]  # fmt: skip
    for model, store, message in cases:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(SharefoldError, match=message):
            sharefold.round_(model, store, IMAGES)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not config_of(tuned).plan.store


def test_the_command_rounds_a_tuned_network_and_verify_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["convert", "timm:digits_resnet", "--calib", "digits", "--calib-count", "240", "--method", "svd", "--budget", "40%"]
    assert call(*base, "-o", "shared").exit_code == 0
    result = reported("round", "shared", "--store", "30kB", "--calib", "digits", "--calib-count", "240", "-o", "small")
    assert result["bytes"]["file"] == (tmp_path / "small" / "model.safetensors").stat().st_size <= 30_000
    assert result["store"] == "mixed:30000B" and 0.5 < result["agreement"] <= 1 and result["report_images"] >= 50
    card = (tmp_path / "small" / "README.md").read_text()
    assert "Divergence from the network before it was rounded on" in card and "Divergence from the original" not in card
    config = read_config(tmp_path / "small")
    assert "agreement" not in config.metrics and config.metrics["rounding"]["agreement"] == result["agreement"]
    assert call("verify", "small").exit_code == 0
    refused(call("round", "shared", "--store", "30kB", "-o", "small"), "exists")
    dense = call("round", "timm:digits_resnet", "--store", "int8", "-o", "other")
    refused(dense, "is not converted: round dense networks by sharefold convert --store int8")
