"""Objectives: what each factor claims is what conversion then does."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from networks import BLOCKS, Boxes, Mute, images, net
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

import sharefold
from sharefold.calibration.calibrate import calibrate
from sharefold.calibration.parts import Parts
from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import Statistics, statistics_of
from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.layers import weight_matrix
from sharefold.measure import agreement
from sharefold.planner import OBJECTIVES
from sharefold.planner.objectives import approximation
from sharefold.plans import GroupPlan, Plan

CALIBRATION = images(32)
NONE = torch.arange(0)


@functools.cache
def problems(kind: str) -> tuple[Statistics, dict[str, GroupProblem]]:
    """What is measured of ``net(kind)``, and the problem of each of its layers."""
    model = net(kind)
    graph = analyze(model, CALIBRATION[:1])
    statistics = statistics_of(model, graph, CALIBRATION)
    return statistics, {name: problem_of(model, graph, [name], statistics) for name in graph.layers}


def factors(kind: str, objective: str) -> list[float]:
    """Of every layer."""
    statistics, found = problems(kind)
    weigh = OBJECTIVES[objective](statistics)
    return [float(weigh(problem, [name])[0]) for name, problem in found.items()]


def test_errors_count_the_same():
    assert set(factors("residual", "error")) == {1.0}


@pytest.mark.parametrize("kind", BLOCKS)
def test_factors_are_finite_and_differ(kind):
    for objective in ("fisher", "kl"):
        found = torch.tensor(factors(kind, objective))
        assert bool(torch.isfinite(found).all()) and bool((found >= 0).all())
        assert found.max() > 2 * found.min()


def test_approximations_have_about_the_error_asked_for():
    for kind in BLOCKS:
        for name, problem in problems(kind)[1].items():
            error = float(problem.errors(approximation(problem, 0.1))[0])
            assert 0.0 <= error < 0.4, (kind, name, error)


def test_kl_is_that_of_converting_the_layer_alone():
    model = net("residual")
    cal = calibrate(model, CALIBRATION)
    graph, statistics = cal.graph, cal.statistics
    weigh = OBJECTIVES["kl"](statistics)
    for name in ("stage1.0.conv1", "stage1.1.conv2"):
        name = name if name in graph.layers else next(n for n in graph.layers if "conv" in n)
        problem = problem_of(model, graph, [name], statistics)
        tried = approximation(problem, 0.1)
        error, factor = float(problem.errors(tried)[0]), float(weigh(problem, [name])[0])
        rank = int(torch.linalg.matrix_rank(tried[0], rtol=1e-4))
        group = GroupPlan(name, "svd", (name,), {"rank": rank})
        converted = copy.deepcopy(model)
        before = sum(p.numel() for p in model.parameters())
        done = sharefold.convert_(converted, Plan([group], before, before), cal, repair=False)
        assert done.plan.groups[0].error == pytest.approx(error, rel=1e-3)
        assert factor**2 * error == pytest.approx(agreement(model, converted, cal.fit_images).kl, rel=0.02, abs=1e-6)


@pytest.mark.parametrize("objective", ["kl", "fisher"])
def test_scale_and_gain_of_standardised_layers_count_once(objective):
    """An NFNet's convolution counts as much as the plain one that computes the same."""
    conv, head = ScaledStdConv2d(3, 16, 3, padding=0), nn.Linear(16, 5)
    nn.init.uniform_(conv.gain, 2.0, 4.0), nn.init.normal_(head.weight)
    plain = nn.Conv2d(3, 16, 3)
    plain.weight, plain.bias = nn.Parameter(weight_matrix(conv).detach().reshape(16, 3, 3, 3)), conv.bias
    found = []
    for layer in (plain, conv):
        model = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
        cal = calibrate(model, CALIBRATION)
        problem = problem_of(model, cal.graph, ["0"], cal.statistics)
        found.append(float(OBJECTIVES[objective](cal.statistics)(problem, ["0"])[0]))
    assert found[0] == pytest.approx(found[1], rel=0.05)


def test_kl_leaves_the_network_as_it_was():
    model = problems("convnext")[0].model
    before = {name: t.clone() for name, t in model.state_dict().items()}
    factors("convnext", "kl")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_objectives_decide_the_plan_and_keep_the_budget():
    model = net("residual")
    limit = sum(p.numel() for p in model.parameters()) // 2
    plans = [
        sharefold.plan(model, budget=limit, calibration=CALIBRATION, method="svd", objective=name) for name in OBJECTIVES
    ]
    assert all(plan.params_after <= limit for plan in plans)
    assert len({tuple(group.options["rank"] for group in plan.groups) for plan in plans}) > 1


def test_unknown_objectives_name_the_nearest():
    with pytest.raises(SharefoldError, match="did you mean fisher"):
        sharefold.plan(net("residual"), budget="50%", calibration=CALIBRATION, objective="fischer")


def test_kl_needs_something_to_compare():
    with pytest.raises(SharefoldError, match="nothing by which"):
        sharefold.plan(Mute(net("residual")), budget="70%", calibration=CALIBRATION, objective="kl")
    plan = sharefold.plan(Boxes(net("residual")), budget="70%", calibration=CALIBRATION, objective="kl")
    assert plan.groups


def of_classes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sixty class means (60, 24), and so many images (n, 24, 1, 1) around them."""
    means = torch.randn(60, 24, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randint(60, (count,), generator=generator)
    return means, (means[shown] + 0.5 * torch.randn(count, 24, generator=generator))[:, :, None, None]


def test_fisher_knows_that_a_classifier_errs_where_it_matters():
    means, given = of_classes(600, 1)
    model = nn.Sequential(nn.Conv2d(24, 24, 1, bias=False), nn.Flatten(), nn.Linear(24, 60)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(24)[:, :, None, None])
        model[2].weight.copy_(means / 2)
        model[2].bias.copy_(-means.square().sum(1) / 4)
    graph = analyze(model, given[:1])
    statistics = statistics_of(model, graph, given, parts=Parts(torch.arange(400), torch.arange(400, 600), NONE))
    problem = problem_of(model, graph, ["2"], statistics)
    tried = approximation(problem, 0.1)
    error = float(problem.errors(tried)[0])
    claimed = float(OBJECTIVES["fisher"](statistics)(problem, ["2"])[0]) ** 2 * error
    rows = statistics.sensitivity()["2"]
    diagonal = float(replace(problem, row_weights=rows[None].to(problem.weights)).energy / 2) * error
    change = (tried - problem.weights)[0].float()
    converted = copy.deepcopy(model)
    with torch.no_grad():
        converted[2].weight.add_(change)
        converted[2].bias.sub_(change @ given[:400].flatten(1).mean(0))
    true = agreement(model, converted, of_classes(2000, 5)[1]).kl
    assert true > 5 * diagonal
    assert claimed == pytest.approx(true, rel=0.6)


def test_vectors_are_those_of_images_apart_and_gradients_those_of_each():
    model, given = net("residual"), images(40)
    statistics = statistics_of(model, analyze(model, given[:1]), given, parts=Parts(torch.arange(30), torch.arange(30, 40), NONE))
    inputs, gradients = statistics.vectors()["fc"]
    assert set(statistics.vectors()) == {"fc"}
    with torch.no_grad():
        logits = model(given[30:])
    torch.testing.assert_close(model.fc(inputs), logits, rtol=1e-4, atol=1e-5)
    # The gradient of the cross-entropy of a drawn label: probabilities, less one at that label.
    drawn = (logits.softmax(1) - gradients).round()
    assert torch.equal(drawn.sum(1), torch.ones(10)) and set(drawn.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(gradients, logits.softmax(1) - drawn, rtol=1e-4, atol=1e-5)
