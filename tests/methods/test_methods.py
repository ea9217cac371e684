"""Every method of the registry: candidates keep their word, solutions have the shapes that loading expects."""

from __future__ import annotations

import importlib
import itertools
import pkgutil

import pytest
import torch
from networks import images, net, stage2_problem
from torch import nn

import sharefold.methods
from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import statistics_of
from sharefold.data import Preprocess, calibration_images
from sharefold.errors import SharefoldError
from sharefold.graph import analyze, find_groups
from sharefold.layers import Bank
from sharefold.methods import AUTO, FOLD, METHODS, RECIPE_STEPS, ConversionStep, LayerMethod, method_named, step_named
from sharefold.plans import GroupPlan

IMAGES = images(16)
PLAIN = (
    "basis",
    "hybrid",
    "svd",
    "spatial",
    "tucker",
    "average",
    "tied",
    "cluster-layer",
    "cluster-filter",
    "cluster-kernel",
    "tied-kernels",
)


@pytest.fixture(scope="module")
def residual() -> GroupProblem:
    return stage2_problem("residual")


CASES = {"residual": "conv", "grouped": "conv", "depthwise": "depthwise", "convnext": "fc1", "std": "conv"}


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("name", PLAIN)
def test_candidates_cost_what_they_say_and_errors_do_not_exceed_them(name: str, kind: str) -> None:
    method, group = METHODS[name], stage2_problem(kind, CASES[kind])
    candidates = method.candidates(group)
    dense = group.weights.numel()
    for candidate in candidates:
        assert 0 < candidate.cost < dense or name in ("average", "tied", "tied-kernels")
        assert method.fits(group.forms, candidate.options)
        # Integer codes count as their bits over 32 on top of the float parameters.
        assert method.cost(group.forms, candidate.options) <= candidate.cost + 1e-6
        assert candidate.errors.shape == (len(group.forms),) and bool((candidate.errors >= -1e-6).all())
    for candidate in candidates[:: max(1, len(candidates) // 3)]:
        solution = method.solve(group, candidate.options)
        blank = method.blank(group.forms, candidate.options)
        assert {k: v.shape for k, v in solution.bank.items()} == {k: v.shape for k, v in blank.bank.items()}
        for mine, empty in zip(solution.members, blank.members, strict=True):
            shapes = {(key, value.shape, value.dtype) for key, value in mine.items()}
            assert shapes == {(key, value.shape, value.dtype) for key, value in empty.items()}
        if solution.errors is not None:
            # Candidates are compared after fewer rounds; the full solution is at least about as good.
            assert float(solution.errors.mean()) <= float(candidate.errors.mean()) * 1.1 + 1e-6


@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize("name", ["svd", "spatial"])
def test_layers_solved_together_are_offered_what_each_is_offered_alone(name: str, kind: str) -> None:
    """The planner solves for all layers of a group at once and gives each its share."""
    method, group = METHODS[name], stage2_problem(kind, CASES[kind])
    together, size = method.candidates(group), len(group.forms)
    for index in range(size):
        alone = method.candidates(group.only(index))
        assert [c.options for c in alone] == [c.options for c in together]
        for mine, every in zip(alone, together, strict=True):
            assert mine.cost == every.cost / size
            torch.testing.assert_close(mine.errors, every.errors[index : index + 1], rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("name", ["basis", "svd", "spatial"])
def test_pivots_save_the_square_of_the_rank_and_change_nothing(name: str, residual: GroupProblem) -> None:
    method, layers = METHODS[name], len(residual.forms)
    full, pivoted = {"rank": 7}, {"rank": 7, "pivoted": True}
    saved = 49 * (1 if name == "basis" else layers)
    assert method.cost(residual.forms, full) - method.cost(residual.forms, pivoted) == saved
    weights = []
    for options in (full, pivoted):
        solution = method.solve(residual, options)
        bank = Bank(solution.bank, layers) if solution.bank else None
        members = zip(residual.forms, solution.members, strict=True)
        weights.append(torch.stack([method.member(form, bank, own, {}).weight for form, own in members]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    size = residual.forms[0].in_channels * 3 if name == "spatial" else residual.forms[0].features
    assert not method.fits(residual.forms, {"rank": size, "pivoted": True})
    assert not method.fits(residual.forms, {"rank": 7, "pivoted": 1})


@pytest.mark.parametrize("name", ["basis", "hybrid", "svd", "spatial", "tucker", "cluster-filter", "cluster-kernel"])
def test_more_parameters_leave_less_error(name: str, residual: GroupProblem) -> None:
    candidates = sorted(METHODS[name].candidates(residual), key=lambda candidate: candidate.cost)
    means = [float(candidate.errors.mean()) for candidate in candidates]
    assert len(means) > 2
    assert all(b <= 1.05 * a + 1e-3 for a, b in itertools.pairwise(means)) and means[-1] < 0.7 * means[0]


def test_tucker_beats_the_basis_in_a_small_group_of_a_trained_network() -> None:
    """Where filters cost more than coefficients; other groups get no candidates."""
    opened = sharefold.open_source("timm:digits_resnet")
    digits = calibration_images("digits", Preprocess.from_cfg(opened.pretrained_cfg), 300, 0)
    graph = analyze(opened.model, digits[:1])
    group = next(group for group in find_groups(graph) if group.weight_shape == (48, 48, 3, 3))
    trained = problem_of(opened.model, graph, group.members, statistics_of(opened.model, graph, digits))
    assert 48 * len(group.members) < 48 * 9

    def best(name: str) -> float:
        candidates = METHODS[name].candidates(trained)
        return min(float(c.errors.mean()) for c in candidates if c.cost <= 0.12 * trained.weights.numel())

    assert best("tucker") < 0.97 * best("basis")
    assert METHODS["tucker"].candidates(stage2_problem("convnext", "fc1")) == []


def test_errors_are_relative_data_norms(residual: GroupProblem) -> None:
    solution = METHODS["basis"].solve(residual, {"rank": 10})
    coefficients = torch.stack([member["coefficients"] for member in solution.members]).double()
    approximation = coefficients @ solution.bank["basis"].flatten(1).double()
    assert solution.errors is not None
    for k, error in enumerate(solution.errors):
        scale = residual.row_weights[k].double().sqrt().unsqueeze(1)
        moment = residual.moments[k, 0].double()
        exact, rest = (
            scale * w for w in (residual.weights[k].double(), residual.weights[k].double() - approximation[k])
        )
        expected = torch.trace(rest @ moment @ rest.T) / torch.trace(exact @ moment @ exact.T)
        assert float(error) == pytest.approx(float(expected), rel=1e-3)


def test_sharing_beats_averaging_and_data_beats_the_mean(residual: GroupProblem) -> None:
    def error(name: str, **options: int) -> float:
        solution = METHODS[name].solve(residual, options)
        assert solution.errors is not None
        return float(solution.errors.mean())

    assert error("tied") < error("average")
    cost = METHODS["tied"].cost(residual.forms, {})
    rank = cost // (METHODS["basis"].cost(residual.forms, {"rank": 1}))
    assert error("basis", rank=rank) < error("tied")


def test_row_weights_are_those_of_the_norm_behind() -> None:
    model = net("residual")
    graph = analyze(model, IMAGES[:1])
    names = ["stage1.0.conv1", "stage1.1.conv1"]
    group = problem_of(model, graph, names, statistics_of(model, graph, IMAGES))
    for row, name in zip(group.row_weights, names, strict=True):
        norm = model.get_submodule(name.replace("conv", "bn"))
        expected = norm.weight.square() / (norm.running_var + norm.eps)
        torch.testing.assert_close(row, expected.detach(), rtol=1e-5, atol=1e-6)


def test_the_registry_names_every_step_once_with_its_paper() -> None:
    steps = {**METHODS, FOLD.name: FOLD, **RECIPE_STEPS}
    assert len(steps) == len(METHODS) + 1 + len(RECIPE_STEPS) and set(AUTO) <= set(METHODS)
    assert all(name == step.name for name, step in steps.items())
    assert all(step.paper.startswith("https://") for step in steps.values())
    assert all(isinstance(method, LayerMethod) for method in METHODS.values())
    assert not any(isinstance(step, LayerMethod) for step in RECIPE_STEPS.values())
    for module in pkgutil.iter_modules(sharefold.methods.__path__):
        importlib.import_module(f"sharefold.methods.{module.name}")
    waiting, defined = [ConversionStep], set()
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        defined |= {kind} if "name" in vars(kind) else set()
    assert defined == {type(step) for step in steps.values()}, "a step that no registry line names"


def test_names_and_aliases() -> None:
    assert method_named("cluster").name == step_named("cluster").name == "cluster-filter"
    assert all(method_named(name) is step_named(name) is method for name, method in METHODS.items())
    for find in (method_named, step_named):
        with pytest.raises(SharefoldError, match=r"unknown method 'spatil' \(did you mean spatial\?\)"):
            find("spatil")


@pytest.mark.parametrize("name", list(RECIPE_STEPS))
def test_steps_of_recipes_are_planned_by_them_alone(name: str) -> None:
    assert step_named(name) is RECIPE_STEPS[name]
    with pytest.raises(SharefoldError, match=f"'{name}' is a step of a published system.*--recipe") as caught:
        method_named(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 8, 3, groups=2), nn.Conv3d(8, 8, 3, groups=4)], ids=str
)
@pytest.mark.parametrize("name", ["svd", "spatial"])
def test_methods_that_take_no_grouped_convolutions_say_so(name: str, layer: nn.Module) -> None:
    with pytest.raises(SharefoldError, match=rf"plan: group 'g': 0 is a grouped convolution, which method {name} does not take"):
        method_named(name).check(nn.Sequential(layer), GroupPlan("g", name, ("0",), {"rank": 2}))
    assert method_named("basis").takes_groups
