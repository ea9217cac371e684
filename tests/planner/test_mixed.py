"""Folding, sharing and their mixtures compete by what the networks lose that they leave."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import Mute, images, net
from torch import nn

import sharefold
from sharefold.calibration.calibrate import calibrate
from sharefold.planner import run_plans
from sharefold.planner.run_plans import Expected, PlanRuns, Rates
from sharefold.plans import Plan

CALIBRATION = images(32)


class Told(PlanRuns):
    """Losses that are given instead of measured."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses

    def loss(self, expected: Expected) -> float:
        return self.losses[expected.plan.source]


def expected(name: str, sharing: float, folding: float) -> Expected:
    return Expected(Plan([], 1, 1, name), sharing, folding)


def test_what_was_lost_corrects_what_is_expected() -> None:
    shared, folded = expected("shared", 0.2, 0.0), expected("folded", 0.0, 0.4)
    rates = Told({"shared": 0.6, "folded": 0.1}).rates([shared, folded])
    assert (rates.sharing, rates.folding) == pytest.approx((3.0, 0.25))
    assert rates.of(0.1, 0.2) == pytest.approx(0.35)


@pytest.mark.parametrize(
    "losses", [{"shared": 0.6, "folded": 0.0}, {"shared": 0.0, "folded": 0.1}, {"shared": math.inf, "folded": 0.1}]
)
def test_nothing_is_corrected_without_both(losses: dict[str, float]) -> None:
    shared, folded = expected("shared", 0.2, 0.0), expected("folded", 0.0, 0.4)
    assert Told(losses).rates([shared, folded]) == Rates()
    assert Told(losses).rates([shared]) == Told(losses).rates([folded]) == Told(losses).rates([]) == Rates()


def test_the_plan_of_least_loss_is_taken_whatever_was_expected() -> None:
    plans = [expected("a", 0.1, 0.0), expected("b", 0.0, 0.9), expected("c", 0.3, 0.1)]
    assert Told({"a": 0.5, "b": 0.2, "c": 0.3}).best(plans).source == "b"
    assert Told({}).best(plans[:1]).source == "a"


def loss(cal: Any, plan: Plan) -> float:
    return PlanRuns(cal).loss(Expected(plan, 0.0, 0.0))


@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_no_mixture_is_worse_than_sharing_alone_or_folding_alone(kind: str) -> None:
    model = net(kind)
    cal = calibrate(model, CALIBRATION)
    methods = ("basis", "svd")
    both, shared, folded = (
        sharefold.plan(model, "60%", cal, method=method) for method in ((*methods, "fold"), methods, "fold")
    )
    assert loss(cal, both) <= min(loss(cal, shared), loss(cal, folded))
    assert both.params_after <= 0.6 * both.params_before


def test_a_plan_is_run_once_and_leaves_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = net("residual"), []
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    cal = calibrate(model, CALIBRATION)
    plan = sharefold.plan(model, "60%", cal, method="svd")
    carry_out = run_plans.carry_out
    monkeypatch.setattr(run_plans, "carry_out", lambda *args: ran.append(args) or carry_out(*args))
    runs, one = PlanRuns(cal), Expected(plan, 0.1, 0.0)
    assert runs.loss(one) == runs.loss(one) > 0 and len(ran) == 1
    assert runs.loss(Expected(Plan([], 1, 1), 0.0, 0.0)) == 0 and len(ran) == 1
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_what_is_expected_counts_where_nothing_can_be_compared() -> None:
    cal = calibrate(Mute(net("residual")), CALIBRATION)
    plan = sharefold.plan(cal.original, "60%", cal, method="svd")
    assert not cal.comparable and PlanRuns(cal).loss(Expected(plan, 0.25, 0.5)) == 0.75
    assert sharefold.plan(cal.original, "60%", cal, method=("svd", "fold")).params_after <= 0.6 * plan.params_before


def test_a_network_that_is_no_longer_finite_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("residual")
    cal = calibrate(model, CALIBRATION)
    plan = sharefold.plan(model, "60%", cal, method="svd")
    carry_out = run_plans.carry_out

    def spoiled(trial: nn.Module, *rest: Any) -> Any:
        done = carry_out(trial, *rest)
        torch.nn.init.constant_(trial.fc.weight, math.nan)
        return done

    monkeypatch.setattr(run_plans, "carry_out", spoiled)
    assert PlanRuns(cal).loss(Expected(plan, 0.1, 0.0)) == math.inf
