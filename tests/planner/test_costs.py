"""What budgets count: the plan's expectation is what the converted network then costs."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from networks import BLOCKS, images
from networks import net as full_net
from torch import nn

import sharefold
from sharefold.calibration.calibrate import Calibration, calibrate
from sharefold.errors import SharefoldError
from sharefold.layers import SharedConv
from sharefold.measure import count_macs
from sharefold.options import PlanOptions
from sharefold.planner import Candidates, cost_of, costs, find_candidates

CALIBRATION = images(16)
net = functools.partial(full_net, blocks=2)


def candidates_of(model: nn.Module, unit: str, method: str = "auto") -> tuple[Candidates, Calibration]:
    cal = calibrate(model, CALIBRATION)
    return find_candidates(cal, PlanOptions(method=method), cost_of(unit, cal.original, cal.graph, cal.example)), cal


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_budget_in_macs_is_kept_to_the_last_one(kind):
    model = net(kind)
    found, cal = candidates_of(model, "macs")
    before = count_macs(model, CALIBRATION[:1])
    assert found.cost.total == before and found.fixed >= 0
    for share in (0.9, 0.7):
        limit = max(int(share * before), int(found.floor) + 1)
        picks = found.pick(limit, "test")
        plan = found.plan(picks, "test")
        converted = copy.deepcopy(model)
        sharefold.convert_(converted, plan, cal, repair=False)
        assert count_macs(converted, CALIBRATION[:1]) == round(found.spent(picks)) <= limit
        assert f"{found.spent(picks):,.0f} MACs of {before:,} MACs expected" in plan.source
    with pytest.raises(SharefoldError, match="the floor is .* MACs"):
        found.pick(found.floor * 0.99, "1% MACs")


def test_a_share_of_macs_through_plan():
    model = net("residual")
    plan = sharefold.plan(model, "80% MACs", CALIBRATION)
    converted = copy.deepcopy(model)
    sharefold.convert_(converted, plan, calibration=CALIBRATION, repair=False)
    assert 0 < count_macs(converted, CALIBRATION[:1]) <= 0.8 * count_macs(model, CALIBRATION[:1])


def test_seconds_are_measured_once_a_shape_and_bound_the_plan(monkeypatch):
    measured = []

    def latency(module: nn.Module, x: torch.Tensor, repeats: int = 20) -> float:
        """A machine that takes a nanosecond for each multiplication and a microsecond a layer."""
        measured.append((module, tuple(x.shape)))
        return 1e-9 * count_macs(module, x) + (1e-6 if isinstance(module, (nn.Conv2d, nn.Linear, SharedConv)) else 0)

    monkeypatch.setattr(costs, "latency", latency)
    model = net("residual")
    found, cal = candidates_of(model, "seconds")
    assert found.cost.total == pytest.approx(1e-9 * count_macs(model, CALIBRATION[:1]))
    dense = {id(module) for module, _ in measured if isinstance(module, (nn.Conv2d, nn.Linear))}
    shapes = {(layer.weight.shape, layer.stride) for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    assert len(shapes) + 1 == len(dense) < len(cal.graph.layers)
    count = len(measured)
    limit = (found.floor + found.cost.total) / 2
    plan = found.plan(found.pick(limit, "test"), "test")
    assert len(measured) == count and "ms of" in plan.source and plan.groups
    converted = copy.deepcopy(model)
    sharefold.convert_(converted, plan, cal, repair=False)
    layers = len([m for m in converted.modules() if isinstance(m, (nn.Conv2d, nn.Linear, SharedConv))])
    assert 1e-9 * count_macs(converted, CALIBRATION[:1]) <= limit + 1e-6 * layers


def test_real_seconds_are_positive_and_cover_every_layer():
    model = net("depthwise")
    found, cal = candidates_of(model, "seconds", "svd")
    assert found.cost.total > 0 and all(found.cost.dense(name) > 0 for name in cal.graph.layers)
    assert all(option.cost > 0 for row in found.options for option in row)


def test_methods_that_run_composed_save_no_macs():
    found, _ = candidates_of(net("residual"), "macs", "average")
    assert found.floor == found.cost.total
