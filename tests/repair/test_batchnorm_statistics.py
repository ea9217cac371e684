"""Re-estimation of BatchNorms: it rescues a damaged network and leaves a sound one alone."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images, logits, net
from repair_works import done_by, work_of
from torch import nn

from sharefold.convert import convert_
from sharefold.measure import agreement
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import batchnorm_statistics as module
from sharefold.repair.batchnorm_statistics import NormStatistics
from sharefold.repair.step_record import StepRecord

FITTING, HELD_OUT = images(64, 3), images(32, 4)


def reestimated(original: nn.Module, model: nn.Module, now: float | None = None) -> StepRecord:
    return done_by(NormStatistics(), work_of(original, model, FITTING, HELD_OUT, now=now))


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_a_damaged_network_is_rescued() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        for block in model.stage2:
            block.conv1.weight.mul_(3), block.conv2.weight.mul_(0.2)
    report = reestimated(original, model)
    assert report["kept"] and report["kl_after"] < 0.5 * report["kl_before"]
    assert agreement(original, model, HELD_OUT).kl == pytest.approx(report["kl_after"], rel=1e-3)


def test_a_known_divergence_is_taken_as_it_is() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight.mul_(4)
    report = reestimated(original, model, now=0.0)
    assert report["kl_before"] == 0.0 and report["kept"] is False  # nothing is below 0
    assert reestimated(original, model)["kept"]


def test_new_statistics_are_those_of_the_images() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight.mul_(4)
    assert reestimated(original, model)["kept"]
    with torch.no_grad():
        y = model.stem(FITTING)
    torch.testing.assert_close(model.bn.running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.bn.running_var, y.var((0, 2, 3)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_a_sound_network_keeps_every_bit_and_setting(training: bool) -> None:
    original = net()
    model = copy.deepcopy(original)
    for norm in norms(model):
        norm.momentum = 0.03
    model.train(training)
    before = copy.deepcopy(model.state_dict())
    report = reestimated(original, model)
    assert report["kept"] is False and report["kl_after"] > report["kl_before"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (
        all(norm.momentum == 0.03 and norm.training == training for norm in norms(model)) and model.training == training
    )


def test_settings_come_back_when_it_is_kept_too() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight.mul_(4)
    counts = [int(norm.num_batches_tracked) for norm in norms(model)]
    assert reestimated(original, model)["kept"]
    assert [int(norm.num_batches_tracked) for norm in norms(model)] == counts
    assert all(norm.momentum == 0.1 and not norm.training for norm in norms(model))


def test_networks_without_batchnorm_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )
    before = logits(model)
    done = reestimated(copy.deepcopy(model), model)
    assert done.to_dict() == {"kept": False, "reason": "the network has no BatchNorm with running statistics"}
    assert torch.equal(logits(model), before)


def test_any_part_of_the_way_can_be_kept() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight.mul_(1.15)
    old = model.bn.running_mean.clone(), model.bn.running_var.clone()

    work = work_of(original, model, FITTING, HELD_OUT)
    partial = NormStatistics().run(work)
    new = model.bn.running_mean.clone(), model.bn.running_var.clone()
    for parts in (1, 4, 0, 2):
        partial.keep(parts)
        for value, first, last in zip((model.bn.running_mean, model.bn.running_var), old, new, strict=True):
            torch.testing.assert_close(value, first + (last - first) * parts / 4)
    assert partial.details(3) == {"step": 0.75}


def test_norms_that_do_not_run_keep_every_bit() -> None:
    """Auxiliary heads run in train mode alone; the norm within a layer of filter bases is composed with it in eval mode."""
    original = net()
    original.auxiliary = nn.BatchNorm2d(3)
    nn.init.normal_(original.auxiliary.running_mean)
    model = copy.deepcopy(original)
    group = GroupPlan("g", "filter-bases", ("stage1.0.conv1", "stage1.1.conv1"), {"shared": 4, "unique": 2})
    convert_(model, Plan([group], 0, 0), FITTING, repair=False)
    before = copy.deepcopy(model.state_dict())
    partial = NormStatistics().run(work_of(original, model, FITTING, HELD_OUT, [group]))
    for parts in (4, 1):
        partial.keep(parts)
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert "bn.running_mean" in changed and not any("auxiliary" in key or "conv1.norm" in key for key in changed)
    assert any("conv1.norm" in key for key in before)


@pytest.mark.parametrize("side", [12, 900])
def test_large_images_still_come_in_batches(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """One image alone has no variance to tell, and a few have a noisy one."""
    original = net()
    work = work_of(original, copy.deepcopy(original), images(40, 3), images(20, 4))
    seen: list[int] = []
    monkeypatch.setattr(module, "run_on", lambda _, batch: seen.append(len(batch)))
    monkeypatch.setattr(type(work.cal), "fit_images", torch.zeros(40, 1, 1, 1).expand(40, 3, side, side))
    module.NormStatistics().run(work)
    assert seen == ([40] if side == 12 else [20, 20])


@torch.no_grad()
@pytest.mark.parametrize("count", [33, 49, 60])
def test_all_images_count_the_same_whatever_the_batches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "MOST", 16)
    original = net()
    model = copy.deepcopy(original)
    fitting = images(count, 3) * torch.linspace(0.1, 4, count)[:, None, None, None]  # the last ones are far from all others
    NormStatistics().run(work_of(original, model, fitting, HELD_OUT))
    y = model.stem(fitting)
    torch.testing.assert_close(model.bn.running_mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.bn.running_var, y.var((0, 2, 3)), rtol=1e-5, atol=1e-5)
