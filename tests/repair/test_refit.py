"""Sequential refit: less divergence on held-out images, or nothing at all."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from networks import images, made_once, net
from repair_works import done_by, work_of
from torch import nn

import sharefold
from sharefold.graph import analyze
from sharefold.layers import shared_layers
from sharefold.measure import agreement
from sharefold.repair import coefficients, rectified
from sharefold.repair import refit as module
from sharefold.repair.guard import Guard
from sharefold.repair.refit import Refit

FITTING, HELD_OUT = images(40, 3), images(20, 4)


@made_once
def converted(kind: str = "residual", budget: str = "40%", method: str = "basis") -> tuple[nn.Module, nn.Module]:
    model = net(kind, blocks=4)
    # Not "joint": its search has seen the whole network and leaves refitting little to mend on networks this small.
    plan = sharefold.plan(model, budget=budget, calibration=FITTING, method=method, objective="fisher")
    done = sharefold.convert_(model, plan, calibration=FITTING, repair=False)
    return done.original, model


@pytest.mark.parametrize("kind", ["residual", "grouped", "depthwise", "convnext"])
def test_it_lowers_the_divergence_or_is_rolled_back(kind: str) -> None:
    original, model = converted(kind, "30%" if kind == "residual" else "60%")
    before = copy.deepcopy(model.state_dict())
    kl = agreement(original, model, HELD_OUT).kl
    report = done_by(Refit(), work_of(original, model, FITTING, HELD_OUT))
    now = agreement(original, model, HELD_OUT).kl
    assert report["kl_before"] == pytest.approx(kl, rel=1e-4, abs=1e-8)
    if report["kept"]:
        assert now == pytest.approx(report["kl_after"], rel=1e-3) and now < kl
    else:
        assert report["kl_after"] >= report["kl_before"]
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if kind == "residual":
        assert report["kept"] and now < kl and report["layers"] == len(shared_layers(model))


def test_worse_results_are_rolled_back_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model = converted()
    before = copy.deepcopy(model.state_dict())
    rising = iter([0.1, 0.2, 0.2, 0.1, 0.3, 0.1])  # before, all layers, a part of the way twice, half of the layers, a quarter
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(rising))
    report = done_by(Refit(), work_of(original, model, FITTING, HELD_OUT))
    assert report["kept"] is False and (report["kl_before"], report["kl_after"]) == (0.1, 0.2)
    assert report["kept_layers"] == 0 and not list(rising)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_layer_gets_the_least_squares_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pull and without a ReLU behind it, its output error on the images is the smallest that its filters allow."""
    monkeypatch.setattr(coefficients, "RIDGES", (1e-9,))
    monkeypatch.setattr(module, "best_step", lambda *_: 1.0)
    monkeypatch.setattr(rectified, "ROUNDS", 0)
    model = net(blocks=2)
    names = ("stage1.0.conv1", "stage1.1.conv1")
    plan = sharefold.Plan([sharefold.GroupPlan("g", "basis", names, {"rank": 5})], 0, 0)
    done = sharefold.convert_(model, plan, calibration=FITTING, repair=False)
    inputs: list[torch.Tensor] = []
    first = names[0]
    handle = done.original.get_submodule(first).register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    with torch.no_grad():
        done.original(FITTING)
    handle.remove()
    falling = iter([1.0, 0.0])
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(falling))
    layer = model.get_submodule(first)
    with torch.no_grad():
        layer.coefficients.add_(0.3 * torch.randn_like(layer.coefficients))  # the prefix is exact: they were best already
        moved = layer.coefficients.clone()
        assert done_by(Refit(), work_of(done.original, model, FITTING, HELD_OUT)).kept
        y = done.original.get_submodule(first)(inputs[0])
        responses = layer.form.apply(inputs[0], layer.filters(), None).transpose(0, 1).flatten(1).T.double()
        target = y.transpose(0, 1).flatten(1).T.double()
        responses, target = responses - responses.mean(0), target - target.mean(0)
        best = torch.linalg.lstsq(responses, target).solution
        left = (responses @ best - target).square().sum()
        found = (responses @ layer.coefficients.T.double() - target).square().sum()
        before = (responses @ moved.T.double() - target).square().sum()
    assert float(found) == pytest.approx(float(left), rel=1e-3) and float(left) < 0.9 * float(before)


def test_mode_and_other_layers_are_left_alone() -> None:
    original, model = converted()
    untouched = {n: p.clone() for n, p in model.named_parameters() if n.startswith(("stem", "fc")) and "bank" not in n
                 and not any(n.startswith(s) for s in shared_layers(model))}  # fmt: skip
    model.train()
    done_by(Refit(), work_of(original, model, FITTING, HELD_OUT))
    assert model.training and untouched
    for name, value in untouched.items():
        assert torch.equal(model.get_parameter(name), value)


def test_networks_without_a_graph_or_without_shared_layers_say_so() -> None:
    original, model = converted()
    blind = dataclasses.replace(analyze(original, FITTING[:1]), fx_graph=None)
    record = done_by(Refit(), work_of(original, model, FITTING, HELD_OUT, graph=blind))
    assert record.to_dict() == {"kept": False, "reason": "the network has no fx graph"}
    dense = net()
    report = done_by(Refit(), work_of(dense, copy.deepcopy(dense), FITTING, HELD_OUT))
    assert report["kept"] is False and "no layer" in report["reason"]
