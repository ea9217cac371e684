"""Budgets are kept, floors are told, exclusions hold."""

from __future__ import annotations

import copy
import functools
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import BLOCKS, Mute, count, images, net
from torch import nn

import sharefold
from sharefold.calibration.calibrate import Calibration, calibrate
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.layers import form_of
from sharefold.measure import agreement, model_bytes
from sharefold.methods import method_named
from sharefold.options import PlanOptions
from sharefold.planner import Planner, file_budget, find_units
from sharefold.planner.candidates import PricedPlans, prices_of

CALIBRATION = images(16)
METHODS = (
    "basis", "hybrid", "svd", "spatial", "tucker", "average", "tied", "cluster-layer", "cluster-filter", "cluster-kernel",
)  # fmt: skip


class Prepared:
    """A network that is calibrated once."""

    def __init__(self, kind: str) -> None:
        self.model = net(kind, blocks=2)
        self.cal = calibrate(self.model, CALIBRATION)
        self.graph = self.cal.graph
        self.planners: dict[PlanOptions, Planner] = {}  # candidates do not depend on the budget
        self.params = count(self.model)

    @property
    def floor(self) -> float:
        return self.planner().candidates().floor

    def planner(self, method: str | tuple[str, ...] = "auto", **options: Any) -> Planner:
        wanted = PlanOptions(method=method, **options)
        return self.planners.setdefault(wanted, Planner(self.cal, wanted))

    def plan(self, budget: str | float, method: str | tuple[str, ...] = "auto", **options: Any) -> sharefold.Plan:
        return self.planner(method, **options).plan(budget)

    def carried_out(self, plan: sharefold.Plan) -> nn.Module:
        model = copy.deepcopy(self.model)
        sharefold.convert_(model, plan, self.cal, repair=False)
        return model


known = functools.cache(Prepared)


@pytest.fixture(params=list(BLOCKS))
def prepared(request: pytest.FixtureRequest) -> Prepared:
    return known(request.param)


@pytest.fixture
def residual() -> Prepared:
    return known("residual")


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.45, 0.99))
def test_the_plan_keeps_its_budget_and_its_word(prepared: Prepared, share: float) -> None:
    budget = max(int(share * prepared.params), math.ceil(prepared.floor))
    plan = prepared.plan(budget)
    assert plan.params_before == prepared.params and plan.params_after <= budget
    model = prepared.carried_out(plan)
    assert count(model) == plan.params_after
    assert prepared.params - sum(g.params_before - g.params_after for g in plan.groups) == plan.params_after
    for groups in (plan.narrowing, plan.sharing):  # what is folded may share what is left of it
        members = [m for g in groups for m in g.members]
        assert len(members) == len(set(members))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget(residual: Prepared, method: str) -> None:
    plan = residual.plan("70%", method)
    assert plan.groups and {g.method for g in plan.groups} == {method}
    assert count(residual.carried_out(plan)) == plan.params_after <= 0.7 * residual.params
    assert "70%" in plan.source and method in plan.source


@pytest.mark.parametrize("method", ["auto", "basis", "average", "spatial"])
def test_the_floor_is_told_and_can_be_reached(residual: Prepared, method: str) -> None:
    with pytest.raises(SharefoldError, match="is below what") as caught:
        residual.plan(10, method)
    found = re.search(r"the floor is ([\d,]+) parameters", str(caught.value))
    assert found and "\n" not in str(caught.value)
    floor = int(found[1].replace(",", ""))
    plan = residual.plan(floor, method)
    assert plan.params_after <= floor and count(residual.carried_out(plan)) == plan.params_after
    with pytest.raises(SharefoldError, match="the floor is"):
        residual.plan(floor - 1, method)


def test_the_verb_gives_the_planners_plan(residual: Prepared) -> None:
    wanted = residual.plan(0.55, "svd", exclude="^stem")
    assert sharefold.plan(residual.model, 0.55, residual.cal, method="svd", exclude="^stem") == wanted
    assert sharefold.plan(residual.model, 0.55, CALIBRATION, method="svd", exclude="^stem") == wanted


def test_more_budget_is_never_worse(residual: Prepared) -> None:
    def damage(plan: sharefold.Plan) -> float:
        return sum((g.error or 0) * len(g.members) for g in plan.groups)

    errors = [damage(residual.plan(share)) for share in (0.4, 0.5, 0.6, 0.75, 0.9)]
    assert errors == sorted(errors, reverse=True)
    assert residual.plan("100%").groups == [] and residual.plan("100%").params_after == residual.params


def test_auto_is_at_least_as_good_as_each_of_its_methods(residual: Prepared) -> None:
    def damage(method: str) -> float:
        return sum((g.error or 0) * len(g.members) for g in residual.plan("45%", method).groups)

    assert damage("auto") <= min(damage(method) for method in ("basis", "hybrid", "svd", "spatial")) * 1.01


@pytest.mark.parametrize("method", ["auto", "basis", "hybrid", "svd", "spatial"])
def test_pivots_buy_accuracy_and_can_be_left_out(residual: Prepared, method: str) -> None:
    def damage(plan: sharefold.Plan) -> float:
        return sum((g.error or 0) * len(g.members) for g in plan.groups)

    pivoted, whole = (residual.plan("45%", method, objective="error", pivots=pivots) for pivots in (True, False))
    assert all(g.options.get("pivoted", g.method == "hybrid") is True for g in pivoted.sharing)
    assert whole.groups and not any("pivoted" in g.options for g in whole.groups)
    assert damage(pivoted) < (1.0 if method == "auto" else 0.97) * damage(whole)  # where auto folds, little is left to pivot
    for plan in (pivoted, whole):
        assert count(residual.carried_out(plan)) == plan.params_after <= 0.45 * residual.params


def test_budgets_in_parameters(residual: Prepared) -> None:
    half = residual.params // 2
    assert residual.plan(half).params_after <= half
    assert residual.plan(f"{half / 1000}k").params_after <= half


@pytest.mark.parametrize("share", [0.3, 0.12])
def test_a_budget_in_bytes_is_that_of_the_file(residual: Prepared, tmp_path: Path, share: float) -> None:
    size = int(model_bytes(residual.model) * share)
    plan = residual.plan(f"{size}B", "basis")
    assert plan.store == f"mixed:{size}B" and sharefold.Plan.from_json(plan.to_json()) == plan
    assert f"stored as {plan.store}" in str(plan)
    model = residual.carried_out(plan)
    sharefold.save(model, tmp_path / "net.safetensors")
    assert 0.9 * size < (tmp_path / "net.safetensors").stat().st_size <= size
    wanted = agreement(residual.model, model, CALIBRATION)
    assert wanted.top1 >= 0.9 and sharefold.load(tmp_path / "net.safetensors", model=copy.deepcopy(residual.model)) is not None


def test_shares_are_compared_in_files_as_they_will_be(residual: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of those tried is taken; nothing in a file has pivots."""
    tried: list[tuple[float, float]] = []
    real = file_budget._divergence

    def noted(cal: Calibration, trial: nn.Module, wanted: sharefold.Plan) -> float:
        plan = trial.sharefold_config.plan
        assert not any(group.options.get("pivoted") for group in plan.groups)
        tried.append((real(cal, trial, wanted), plan.params_after / residual.params))
        return tried[-1][0]

    monkeypatch.setattr(file_budget, "_divergence", noted)
    monkeypatch.setattr(file_budget, "SAME", 0.0)
    size = int(model_bytes(residual.model) * 0.08)
    plan = residual.plan(f"{size}B", ("basis", "svd"))
    assert len(tried) >= 3 and plan.params_after / residual.params == min(tried)[1]
    assert [share for _, share in tried] == sorted((share for _, share in tried), reverse=True)
    tried.clear()
    monkeypatch.setattr(file_budget, "SAME", 1.0)
    assert residual.plan(f"{size}B", ("basis", "svd")).groups == [] and len(tried) == 1
    residual.carried_out(plan)


def test_all_shares_are_tried_where_bits_are_few(residual: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def growing(cal: Calibration, trial: nn.Module, wanted: sharefold.Plan) -> float:
        tried.append(wanted.params_after / residual.params)
        return float(len(tried))

    monkeypatch.setattr(file_budget, "_divergence", growing)
    size = residual.params // 8  # a bit a weight
    monkeypatch.setattr(file_budget, "FEW_BITS", 1.1)
    assert residual.plan(f"{size}B", "svd").groups == [] and len(tried) > 1 + file_budget.PATIENCE
    tried.clear()
    monkeypatch.setattr(file_budget, "FEW_BITS", 0.9)
    assert residual.plan(f"{size}B", "svd").groups == [] and len(tried) == 1 + file_budget.PATIENCE


def test_too_few_bytes_are_refused_with_about_as_many_as_would_do(residual: Prepared) -> None:
    with pytest.raises(SharefoldError, match=r"below what a file of this network can be shrunk to, about [\d,]+ bytes") as error:
        residual.plan("300B", "svd")
    least = int(str(error.value).rpartition("about ")[2].split()[0].replace(",", ""))
    assert residual.plan(f"{least + 300}B", "svd").store == f"mixed:{least + 300}B"


def test_exclude_that_matches_nothing_is_told(residual: Prepared) -> None:
    with pytest.warns(SharefoldWarning, match="exclude '\\^stemm' matches no module of this network"):
        Planner(residual.cal, PlanOptions(exclude="^stemm"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Planner(residual.cal, PlanOptions(exclude="stage1"))


def test_a_layer_alone_cannot_be_replaced() -> None:
    with pytest.raises(SharefoldError, match=r"a layer alone.*wrap it, nn\.Sequential\(layer\)"):
        sharefold.plan(nn.Conv2d(3, 16, 3), "50%", torch.rand(8, 3, 6, 6))


def test_a_file_of_a_detector(tmp_path: Path) -> None:
    """Its outputs cannot be compared, so that it is rounded and shares nothing."""
    model = Mute(net())
    size = int(model_bytes(model) * 0.2)
    plan = sharefold.plan(model, budget=f"{size}B", calibration=CALIBRATION)
    assert plan.groups == [] and plan.store == f"mixed:{size}B"
    sharefold.convert_(model, plan, calibration=CALIBRATION)
    assert sharefold.save(model, tmp_path / "boxes.safetensors").stat().st_size <= size


def test_bytes_that_hold_the_network_as_it_is_change_nothing(residual: Prepared) -> None:
    plan = residual.plan("1GB")
    assert plan.groups == [] and plan.store == ""


def test_bytes_that_hold_nothing_are_refused(residual: Prepared) -> None:
    with pytest.raises(SharefoldError, match="below what a file"):
        residual.plan("400B", "basis")


def test_no_option_asks_for_more_filters_than_its_layers_have_rows(residual: Prepared) -> None:
    """Members may leave a group whose bank was made for all of them."""
    planner = residual.planner("basis")
    plans = [plan for row in planner.candidates().options for option in row for plan in option.plans]
    assert any(plan.options["rank"] > 8 for plan in plans)
    for plan in plans:
        layers = [residual.model.get_submodule(name) for name in plan.members]
        assert plan.options["rank"] <= min(layers[0].weight[0].numel(), sum(len(layer.weight) for layer in layers)), plan
    forms = [form_of(residual.model.get_submodule(name)) for name in ("stage1.0.conv1", "stage1.1.conv1")]
    assert method_named("basis").fits(forms, {"rank": 16}) and not method_named("basis").fits(forms, {"rank": 17})


def test_exclude(residual: Prepared) -> None:
    plan = residual.plan("70%", exclude=r"^stage1|^stem")
    assert plan.groups and not any(m.startswith(("stage1", "stem")) for g in plan.groups for m in g.members)
    with pytest.raises(SharefoldError, match="not a regular expression"):
        residual.plan("70%", exclude="[")
    assert not any("conv1" in m for unit in find_units(residual.graph, "conv1") for m in unit.members)


def test_units_cover_every_layer_once(prepared: Prepared) -> None:
    members = [m for unit in find_units(prepared.graph) for m in unit.members]
    assert sorted(members) == sorted(prepared.graph.layers)


@pytest.mark.parametrize("budget", ["lots", "-3", "0", "150%", "5 lightyears"])
def test_budgets_that_are_none(residual: Prepared, budget: str) -> None:
    with pytest.raises(SharefoldError, match="budget"):
        residual.plan(budget)


def test_unknown_methods_name_the_nearest(residual: Prepared) -> None:
    with pytest.raises(SharefoldError, match="did you mean basis"):
        residual.plan("50%", "basiss")


def test_prices_are_where_the_best_option_changes() -> None:
    points = [(10, 0.0), (6, 4e-9), (5, 9e-9), (4, 10e-9), (1, 40e-9)]  # 5 is above the hull
    row = [PricedPlans(*point) for point in points]
    slopes = [1e-9, 3e-9, 1e-8]  # 4e-9 / 4, 6e-9 / 2, 30e-9 / 3
    prices = prices_of([row])
    best = [min(row, key=lambda o: o.value + price * o.cost).cost for price in prices]
    assert set(best) == {10, 6, 4, 1} and best == sorted(best, reverse=True)
    assert min(prices) < slopes[0] and max(prices) > slopes[-1]
    scaled = prices_of([[PricedPlans(o.cost, 1e6 * o.value) for o in row]])
    assert scaled == pytest.approx([1e6 * price for price in prices])
    assert prices_of([[PricedPlans(3, 0.0)]]) == []


def test_small_outputs_do_not_leave_the_budget_unused() -> None:
    """Damages of a network of tiny logits are tiny: they still differ from layer to layer."""
    model = net("residual")
    with torch.no_grad():
        model.fc.weight.mul_(1e-4)
    plan = sharefold.plan(model, budget="80%", calibration=CALIBRATION, method="svd")
    assert plan.size > 0.7
