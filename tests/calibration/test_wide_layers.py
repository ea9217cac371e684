"""Layers of very many features: moments in the space of their rows give what full moments give."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import BLOCKS, images, net
from torch import nn

import sharefold
from sharefold.calibration import statistics as module
from sharefold.calibration.problem import problem_of
from sharefold.calibration.statistics import is_wide, statistics_of
from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.layers import form_of
from sharefold.measure import agreement
from sharefold.plans import GroupPlan, Plan
from sharefold.store import prepare

IMAGES = images(40)


@pytest.fixture(autouse=True)
def _hardly_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrinkage towards the identity is another thing in fewer dimensions."""
    monkeypatch.setattr(module, "LARGEST_SHARE", 1e-3)


def wide_layers(model: nn.Module) -> list[str]:
    forms = {name: form_of(layer) for name, layer in model.named_modules()}
    return [name for name, form in forms.items() if form is not None and is_wide(form)]


def converted(kind: str, method: str = "svd") -> tuple[nn.Module, sharefold.Plan]:
    model = net(kind)
    plan = sharefold.plan(model, budget="80%", calibration=IMAGES, method=method, objective="error")
    done = sharefold.convert_(model, plan, calibration=IMAGES, repair=False)
    return model, done.plan


@pytest.mark.parametrize("kind", BLOCKS)
def test_low_rank_is_the_same_in_the_space_of_the_rows(kind, monkeypatch):
    wanted, plan = converted(kind)
    monkeypatch.setattr(module, "WIDE", 20)
    found, again = converted(kind)
    if kind in ("residual", "std"):
        assert wide_layers(net(kind))
    assert [(g.members, g.options) for g in plan.groups] == [(g.members, g.options) for g in again.groups]
    for one, other in zip(plan.groups, again.groups, strict=True):
        assert one.error == pytest.approx(other.error, rel=0.05, abs=1e-4)
    torch.testing.assert_close(found(IMAGES), wanted(IMAGES), rtol=0.05, atol=0.05)


def test_statistics_hold_nothing_of_the_full_size(monkeypatch):
    monkeypatch.setattr(module, "WIDE", 20)
    model = net("residual")
    graph = analyze(model, IMAGES[:1])
    statistics = statistics_of(model, graph, IMAGES)
    name = wide_layers(model)[0]
    form = form_of(model.get_submodule(name))
    rows, features = form.out_channels, form.features
    assert statistics.moments([name])[name].shape == (1, rows, rows)
    assert statistics.bytes_of([name]) == 4 * rows * rows
    frame = statistics.frames[name]
    torch.testing.assert_close(frame.T @ frame, torch.eye(rows), rtol=0, atol=1e-5)
    assert frame.shape == (features, rows) and statistics.means[name].shape == (1, features)
    problem = problem_of(model, graph, [name], statistics)
    weight = model.get_submodule(name).weight.detach().reshape(1, rows, -1)
    torch.testing.assert_close(problem.full(problem.weights), weight, rtol=1e-4, atol=1e-5)


def test_other_methods_leave_wide_layers_or_say_so(monkeypatch):
    monkeypatch.setattr(module, "WIDE", 20)
    model = net("residual")
    name = wide_layers(model)[0]
    plan = sharefold.plan(model, budget="85%", calibration=IMAGES)
    assert all(group.method == "svd" for group in plan.groups if set(group.members) & set(wide_layers(model)))
    before = copy.deepcopy(model.state_dict())
    params = sum(p.numel() for p in model.parameters())
    own = Plan([GroupPlan(name, "spatial", (name,), {"rank": 2})], params, params)
    with pytest.raises(SharefoldError, match="too many for method spatial: take svd"):
        sharefold.convert_(model, own, calibration=IMAGES)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_wide_layers_are_stored_without_their_moments(monkeypatch):
    seen = []
    gather = prepare.gather

    def watched(network: nn.Module, forms: dict, *rest: object) -> dict:
        seen.extend(form.features for form in forms.values())
        return gather(network, forms, *rest)

    monkeypatch.setattr(prepare, "WIDE", 20)
    monkeypatch.setattr(prepare, "gather", watched)
    model = net("residual")
    plan = sharefold.plan(model, budget="95%", calibration=IMAGES, method="svd")
    plan.store = "int8"
    done = sharefold.convert_(model, plan, calibration=IMAGES)
    assert seen and max(seen) <= 20 and agreement(done.original, model, IMAGES).top1 > 0.8
