"""Budgets that hold together: every part is met, at less damage than by squeezing one of them; floors say what is in the way."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from networks import count, images, net
from torch import nn

import sharefold
from sharefold.calibration.calibrate import calibrate
from sharefold.errors import SharefoldError
from sharefold.layers import SharedConv, checked_form
from sharefold.measure import count_macs, model_bytes
from sharefold.methods import Candidate, method_named
from sharefold.options import PlanOptions
from sharefold.planner import Planner, combined_mix, costs
from sharefold.planner.bounds import Bounds, Unreachable
from sharefold.planner.candidates import PricedPlans
from sharefold.planner.combined import Combined
from sharefold.planner.fold_many import ManyLevels
from sharefold.planner.run_plans import Expected, PlanRuns

CALIBRATION = images(16)
# Positions of pivots count as much as numbers where parameters are priced; plans tell the numbers alone.
PIVOTS = 0.98
SHARING = ("basis", "svd", "spatial")


@functools.cache
def planner(kind: str, method: str | tuple[str, ...] = "auto", objective: str = "fisher") -> Planner:
    return Planner(calibrate(net(kind, blocks=2), CALIBRATION), PlanOptions(method=method, objective=objective))


def spent(known: Planner, plan: sharefold.Plan) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the converted network."""
    model = copy.deepcopy(known.cal.original)
    sharefold.convert_(model, plan, known.cal, repair=False)
    return count(model), count_macs(model, CALIBRATION[:1])


def dense(known: Planner) -> tuple[int, int]:
    return count(known.cal.original), count_macs(known.cal.original, CALIBRATION[:1])


def combined(known: Planner) -> Combined:
    """The options for parameters and multiply-accumulates."""
    return known._combined[("parameters", "macs"), True]


@pytest.mark.parametrize("kind", ["residual", "grouped", "depthwise"])
@pytest.mark.parametrize("shares", [(60, 80), (40, 60), (80, 45)])
def test_both_parts_are_met_and_told(kind: str, shares: tuple[int, int]) -> None:
    known = planner(kind, SHARING)
    plan = known.plan(f"{shares[0]}%, {shares[1]}% MACs")
    params, macs = spent(known, plan)
    before = dense(known)
    assert params == plan.params_after <= before[0] * shares[0] / 100 and macs <= before[1] * shares[1] / 100
    assert plan.source == (
        f"budget {shares[0]}%, {shares[1]}% MACs, method basis + svd + spatial: "
        f"{params:,} parameters of {before[0]:,} parameters and {macs:,} MACs of {before[1]:,} MACs expected"
    )
    turned = known.plan(f"{shares[1]}% MACs, {shares[0]}%")
    assert turned.groups == plan.groups


@pytest.mark.parametrize("budget", ["60%, 70% MACs", "35%, 40% MACs"])
def test_channels_are_folded_for_both_and_the_rest_is_shared(budget: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(runs: PlanRuns, expected: Expected) -> float:
        """As expected, and little of what does both: on so small a network one of the two alone may be best."""
        return expected.sharing + expected.folding if not expected.sharing * expected.folding else 0.0

    monkeypatch.setattr(PlanRuns, "loss", loss)
    monkeypatch.setattr(combined_mix, "WORTH", math.inf)
    known = planner("depthwise")
    plan = known.plan(budget)
    limits = [float(text) / 100 for text in re.findall(r"(\d+)%", budget)]
    for amount, before, share in zip(spent(known, plan), dense(known), limits, strict=True):
        assert amount <= share * before
    assert plan.narrowing and "method auto + fold: " in plan.source
    assert f"{plan.params_after:,} parameters of {dense(known)[0]:,} parameters and" in plan.source


def bounds(known: Planner, *limits: float) -> Bounds:
    units = "parameters", "macs"
    return Bounds(units, tuple(known.cost(unit) for unit in units), limits, ("", ""))


def macs_of(known: Planner, plan: sharefold.Plan) -> float:
    cost, model = known.cost("macs"), known.cal.original
    total = cost.total
    for group in plan.groups:
        forms = [checked_form(name, model.get_submodule(name)) for name in group.members]
        candidate = Candidate(group.options, 0.0, torch.zeros(len(forms)))
        total += cost.shared(group.members, forms, method_named(group.method), candidate, range(len(forms)))
        total -= sum(cost.dense(name) for name in group.members)
    return total


def squeezed(known: Planner, unit: str, limits: Sequence[float]) -> float:
    """The least damage by a budget in ``unit`` alone that is lowered until both limits are met."""
    candidates, best = known.candidates(unit), float("inf")
    for limit in torch.linspace(candidates.floor, limits[unit == "macs"], 60, dtype=torch.float64).tolist():
        picks = candidates.pick(limit, "")
        plan = candidates.plan(picks, "")
        if plan.params_after <= PIVOTS * limits[0] and macs_of(known, plan) <= limits[1]:
            best = min(best, candidates.damage(picks))
    return best


@pytest.mark.parametrize("shares", [(0.6, 0.7), (0.4, 0.6)])
def test_it_is_no_worse_than_squeezing_one_budget_until_both_hold(shares: tuple[float, float]) -> None:
    known = planner("residual", SHARING)
    limits = [share * before for share, before in zip(shares, dense(known), strict=True)]
    known.plan(f"{shares[0]}, {100 * shares[1]}% MACs")
    found = combined(known).within(bounds(known, *limits))
    damage = found.damage(found.pick(0.0, ""))
    assert damage > 0 and damage <= 1.001 * min(squeezed(known, unit, limits) for unit in ("parameters", "macs"))


def test_a_part_that_everything_meets_changes_nothing() -> None:
    known = planner("residual", SHARING)
    alone = known.candidates()
    limit = 0.5 * dense(known)[0]
    known.plan("50%, 100% MACs")
    found = combined(known).within(bounds(known, limit, 2.0 * dense(known)[1]))
    assert found.damage(found.pick(0.0, "")) <= 1.0001 * alone.damage(alone.pick(limit, ""))


def test_every_option_costs_what_its_plans_do() -> None:
    known = planner("residual", SHARING)
    known.plan("60%, 80% MACs")
    found = combined(known)
    macs, parameters = known.cost("macs"), known.cost("parameters")
    for members, row, prices in zip(found.members, found.options, found.prices, strict=True):
        assert not row[0].plans and prices[0] == tuple(sum(c.dense(n) for n in members) for c in (parameters, macs))
        for option, price in zip(row, prices, strict=True):
            assert all(price[0] >= plan.params_after for plan in option.plans)
            less = [p for other, p in zip(row, prices, strict=True) if other.value < option.value]
            assert not any(p[0] <= price[0] and p[1] <= price[1] for p in less)


def test_what_cannot_be_met_together_names_the_part_and_the_floors() -> None:
    """Each of two groups can be cheap in one unit: (25, 25), (17, 22), (22, 17), (9, 19), (14, 14) and (19, 9) can be had."""
    known = planner("residual", SHARING)
    units = copy.copy(known.cost("parameters")), copy.copy(known.cost("macs"))
    units[0].total = units[1].total = 25
    prices = ((10.0, 10.0), (2.0, 7.0), (7.0, 2.0))
    rows = [[PricedPlans(cost[0], float(value)) for value, cost in enumerate(prices)] for _ in range(2)]
    found = Combined(rows, units[0], 5, 25, "auto", costs=units, prices=(prices, prices), fixed_each=(5.0, 5.0))

    def within(*limits: float) -> Combined:
        return found.within(Bounds(("parameters", "macs"), units, limits, (f"{limits[0]}", f"{limits[1]} MACs")))

    for limits, wanted in (((25, 25), [25, 25]), ((14, 14), [14, 14]), ((9, 19), [9, 19]), ((20, 9), [19, 9])):
        assert within(*limits).spent_each(within(*limits).pick(0.0, "")) == wanted
    with pytest.raises(Unreachable) as caught:
        within(13, 13).pick(0.0, "13, 13 MACs")
    assert str(caught.value) == (
        "budget 13, 13 MACs: auto can meet each part on this model, not all at once: beside 13 MACs the floor of 13 is "
        "19 parameters (76.0%); beside 13 the floor of 13 MACs is 19 MACs (76.0%); alone the floors are 9 parameters (36.0%) and "
        "9 MACs (36.0%); raise a part or allow more methods"
    )
    with pytest.raises(Unreachable, match=r"^budget 8 MACs \(8 MACs\) is below .* the floor is 9 MACs \(36.0%\)"):
        within(13, 8).pick(0.0, "13, 8 MACs")


@pytest.mark.parametrize(("budget", "words"), [("1%, 90% MACs", r"budget 1% \("), ("90%, 1% MACs", r"budget 1% MACs \(")])
@pytest.mark.parametrize("method", [SHARING, ("fold",)])
def test_a_part_that_cannot_be_met_alone_is_refused_as_alone(budget: str, words: str, method: tuple[str, ...]) -> None:
    with pytest.raises(SharefoldError, match=words + ".*the floor is"):
        planner("depthwise", method).plan(budget)


def test_folding_alone_meets_all_parts_at_the_least_damage_of_the_prices_tried() -> None:
    known = planner("depthwise", ("fold",))
    plan = known.plan("70%, 60% MACs")
    before = dense(known)
    params, macs = spent(known, plan)
    assert params == plan.params_after <= 0.7 * before[0] and macs <= 0.6 * before[1]
    assert plan.groups and not plan.sharing
    levels = ManyLevels([known.levels("parameters"), known.levels("macs")])
    assert levels.totals(levels.one.dense) == [known.cost("parameters").total, known.cost("macs").total]
    for limits in ([0.7 * before[0], 0.6 * before[1]], [0.5 * before[0], float("inf")], [float("inf"), 0.5 * before[1]]):
        widths = levels.within(limits)
        assert widths is not None
        assert all(total <= limit for total, limit in zip(levels.totals(widths), limits, strict=True))
        for unit, limit in enumerate(limits):  # no wider space fits
            if limit < float("inf"):
                alone = levels.levels[unit].within(limit)
                if all(total <= other for total, other in zip(levels.totals(alone), limits, strict=True)):
                    assert levels._loss(widths) <= levels._loss(alone) * 1.2
    assert levels.within([0.0, float("inf")]) is None


def test_the_joint_search_keeps_both() -> None:
    known = planner("residual", SHARING, "joint")
    plan = known.plan("60%, 70% MACs")
    for amount, before, share in zip(spent(known, plan), dense(known), (0.6, 0.7), strict=True):
        assert amount <= share * before


def test_three_at_once_with_time_as_a_machine_would_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def latency(module: nn.Module, x: torch.Tensor, repeats: int = 20) -> float:
        """A nanosecond for each multiplication and a microsecond a layer."""
        return 1e-9 * count_macs(module, x) + (1e-6 if isinstance(module, (nn.Conv2d, nn.Linear, SharedConv)) else 0)

    monkeypatch.setattr(costs, "latency", latency)
    known = Planner(calibrate(net("residual"), CALIBRATION), PlanOptions(method=("svd", "spatial")))
    plan = known.plan("70%, 75% MACs, 80% latency")
    for amount, before, share in zip(spent(known, plan), dense(known), (0.7, 0.75), strict=True):
        assert amount <= share * before
    found = re.search(r"MACs and ([\d.]+) ms of ([\d.]+) ms expected", plan.source)
    assert found is not None and float(found[1]) <= 0.801 * float(found[2])


@pytest.mark.parametrize("other", ["70% MACs", "55%"])
def test_a_file_of_so_many_bytes_that_also_multiplies_less(tmp_path: Path, other: str) -> None:
    known = planner("residual", SHARING)
    size = int(0.25 * model_bytes(known.cal.original))
    plan = known.plan(f"{size}B, {other}")
    assert plan.store == f"mixed:{size}B" and plan.groups and f"budget {size}B, {other}, method" in plan.source
    params, macs = spent(known, plan)
    limits = {"70% MACs": (1.0, 0.7), "55%": (0.55, 1.0)}[other]
    assert params <= limits[0] * dense(known)[0] and macs <= limits[1] * dense(known)[1]
    model = copy.deepcopy(known.cal.original)
    sharefold.convert_(model, plan, known.cal, repair=False)
    assert sharefold.save(model, tmp_path / "net.safetensors").stat().st_size <= size


def test_bytes_that_hold_everything_leave_the_other_part(tmp_path: Path) -> None:
    known = planner("residual", SHARING)
    assert known.plan("1GB, 70% MACs").groups == known.plan("70% MACs").groups
    assert known.plan("1GB, 70% MACs").store == ""
    with pytest.raises(SharefoldError, match="below what a file"):
        known.plan("900B, 90% MACs")


def test_the_verb_takes_them() -> None:
    known = planner("residual", SHARING)
    plan = sharefold.plan(known.cal.original, "60%, 80% MACs", known.cal, method=SHARING)
    assert plan == known.plan("60%, 80% MACs") and sharefold.Plan.from_json(plan.to_json()) == plan
