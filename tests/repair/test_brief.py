"""The short refinement at the end of the repairs: where there is one, and that nothing is lost where it fails."""

from __future__ import annotations

import copy
from collections.abc import Generator
from typing import Any

import pytest
import torch
from networks import images, net, same, state
from torch import nn

import sharefold
from sharefold.calibration.calibrate import Calibration
from sharefold.convert import Conversion
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import brief, refine
from sharefold.repair.work import Work

IMAGES = images(720)
PLAN = Plan([GroupPlan("g", "spatial", (f"stage1.{k}.conv{j}",), {"rank": 2}) for k, j in ((0, 1),)], 0, 0)


@pytest.fixture(scope="module")
def cal() -> Calibration:
    return sharefold.calibrate(net(blocks=2), IMAGES)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brief, "EPOCHS", 2)
    monkeypatch.setattr(brief, "NEARLY_NATS", 0.0)


def converted(cal: Calibration, plan: Plan = PLAN, **options: Any) -> tuple[nn.Module, Conversion]:
    model = copy.deepcopy(cal.original)
    return model, sharefold.convert_(model, plan, cal, **options)


def test_repairs_end_with_it(cal: Calibration) -> None:
    step = converted(cal)[1].steps["refine"]
    assert step.details["epochs"] == 2 and (not step.kept or step.kl_after < step.kl_before)
    asked = converted(cal, refine=2)[1].steps["refine"]
    assert asked.kl_after == pytest.approx(step.kl_after, rel=1e-4)


@pytest.mark.parametrize("options", [{"refine": 0}, {"refine": False}, {"refine": "0"}, {"repair": False}])
def test_who_says_otherwise_has_none(cal: Calibration, options: dict[str, Any]) -> None:
    assert "refine" not in converted(cal, **options)[1].steps


@pytest.mark.parametrize(
    ("limit", "value"), [("FEWEST_IMAGES", 600), ("LARGEST_SAMPLE", 400), ("MOST_WORK", 10.0)], ids=lambda v: str(v)
)
def test_none_where_it_is_long_or_learns_by_heart(
    cal: Calibration, monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    assert brief.brief_refinement(cal, PLAN) is not None
    monkeypatch.setattr(brief, limit, value)
    assert brief.brief_refinement(cal, PLAN) is None


def test_none_where_nothing_was_shared_and_fewer_epochs_where_each_takes_long(
    cal: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert brief.brief_refinement(cal, Plan([], 0, 0)) is None
    work = brief.PASSES * len(cal.fit_images) * sharefold.measure.count_macs(cal.original, IMAGES[:1])
    monkeypatch.setattr(brief, "MOST_WORK", 1.5 * work)
    found = brief.brief_refinement(cal, PLAN)
    assert found is not None and found.options.epochs == 1


def test_what_is_nearly_right_is_left(cal: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brief, "NEARLY_NATS", 1e9)
    step = converted(cal)[1].steps["refine"]
    assert not step.kept and step.reason == "the network already says nearly what the original says"


def test_a_network_that_cannot_be_trained_is_left_as_the_repairs_left_it(
    cal: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = converted(cal, refine=0)

    def fails(work: Work, *rest: Any) -> Generator[float, None, None]:
        with torch.no_grad():
            for parameter in work.model.parameters():
                parameter.add_(1)
        yield 0.5
        raise RuntimeError("no gradients\nhere")

    monkeypatch.setattr(refine, "training", fails)
    model, done = converted(cal)
    step = done.steps["refine"]
    assert not step.kept and step.reason == "the network cannot be trained (no gradients)"
    assert same(state(model), state(wanted))
    with pytest.raises(RuntimeError, match="no gradients"):  # who asks for it is told
        converted(cal, refine=2)


def test_none_where_its_work_cannot_be_told(cal: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> int:
        raise RuntimeError("it takes pairs of images")

    monkeypatch.setattr(brief, "count_macs", fails)
    assert brief.brief_refinement(cal, PLAN) is None
