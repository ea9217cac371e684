"""Factors of layers that share nothing, solved again on the converted prefix."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images, made_once, net
from repair_works import done_by, work_of
from torch import Tensor, nn

import sharefold
from sharefold.graph import analyze
from sharefold.layers.form import form_of
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import coefficients
from sharefold.repair import refit as refit_module
from sharefold.repair.guard import Guard
from sharefold.repair.lockstep import Visited
from sharefold.repair.own_factors import has_own_factors, own_factors
from sharefold.repair.refit import Refit
from sharefold.repair.samples import Collector

IMAGES, HELD_OUT = images(40, 3), images(20, 4)
NAME = "stage1.0.conv1"


@made_once
def converted(method: str, rank: int) -> tuple[nn.Module, nn.Module, GroupPlan]:
    model = net(blocks=2)
    plan = Plan([GroupPlan(NAME, method, (NAME,), {"rank": rank})], 0, 0)
    done = sharefold.convert_(model, plan, calibration=IMAGES, repair=False)
    return done.original, model, plan.groups[0]


@torch.no_grad()
def mixed(original: nn.Module, distance: float) -> tuple[Tensor, Tensor]:
    """Inputs as a prefix with errors would give them, and the outputs of the original layer."""
    layer = original.get_submodule(NAME)
    assert isinstance(layer, nn.Conv2d)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(64, layer.in_channels, 8, 8, generator=generator)
    turn = torch.eye(layer.in_channels) + distance * torch.randn(layer.in_channels, layer.in_channels, generator=generator)
    return torch.einsum("ij,bjhw->bihw", turn, clean), layer(clean)


def visited(
    original: nn.Module, model: nn.Module, norm: str | None, inputs: list[Tensor], targets: list[Tensor], name: str = NAME
) -> Visited:
    """The layer, come to with batches of these inputs and targets; nothing else of the walk is asked for here."""
    form = form_of(original.get_submodule(name))
    assert form is not None
    collector = Collector(form, sum(len(batch) for batch in inputs))
    for given, wanted in zip(inputs, targets, strict=True):
        collector.add(given, wanted)
    samples = collector.samples()
    assert samples is not None and samples.given is None
    return Visited(original, model, name, norm, samples)


def output_error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        gap = model.get_submodule(NAME).form.apply(x, model.get_submodule(NAME).compose(), None) - y  # type: ignore[operator,union-attr]
    gap = gap - gap.mean((0, 2, 3), keepdim=True)
    return float(gap.square().mean() / y.var((0, 2, 3), unbiased=False).mean())


@pytest.mark.parametrize("method", ["spatial", "svd"])
def test_full_rank_undoes_what_the_prefix_did(method: str) -> None:
    layer = net(blocks=2).get_submodule(NAME)
    assert isinstance(layer, nn.Conv2d)
    rank = {"spatial": min(3 * layer.in_channels, 3 * layer.out_channels), "svd": layer.out_channels}[method]
    original, model, plan = converted(method, rank)
    x, y = mixed(original, 0.2)
    assert output_error(model, x, y) > 0.01
    norm = analyze(original, IMAGES[:1]).layers[NAME].norm
    at = visited(original, model, norm, [x[:40], x[40:]], [y[:40], y[40:]])
    own_factors(at, at.samples, plan, ridge=1e-9)
    assert output_error(model, x, y) < 1e-3


def refitted(at: Visited, plan: GroupPlan | None) -> float:
    """The output error after a visit of the refit, which fits and decides on all samples."""
    step = refit_module._visit(at, at.samples, at.samples, plan)
    assert 0 < step <= 1
    return output_error(at.model, *mixed(at.original, 0.4))


@pytest.mark.parametrize("method", ["spatial", "svd"])
def test_it_beats_new_coefficients_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "RIDGES", (1e-6,))
    original, model, plan = converted(method, 4)
    x, y = mixed(original, 0.4)
    norm = analyze(original, IMAGES[:1]).layers[NAME].norm
    errors = [refitted(visited(original, copy.deepcopy(model), norm, [x], [y]), told) for told in (None, plan)]
    assert errors[1] < 0.98 * errors[0] < output_error(model, x, y)


def test_factors_that_do_worse_on_images_that_decide_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, plan = converted("svd", 4)
    x, y = mixed(original, 0.4)
    norm = analyze(original, IMAGES[:1]).layers[NAME].norm
    without = copy.deepcopy(model)

    def spoils(at: Visited, *_: object) -> None:
        for parameter in at.layer.parameters():
            nn.init.normal_(parameter)
        tried.append(at)

    tried: list[Visited] = []
    monkeypatch.setattr(refit_module, "own_factors", spoils)
    refitted(visited(original, without, norm, [x], [y]), None)
    refitted(visited(original, model, norm, [x], [y]), plan)
    assert len(tried) == 1
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, without.state_dict()[key]), key


def test_linear_layers_of_tokens() -> None:
    model = net("convnext", blocks=2)
    graph = analyze(model, IMAGES[:1])
    name = next(n for n, r in graph.layers.items() if isinstance(model.get_submodule(n), nn.Linear) and r.stage is not None)
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Linear)
    plan = Plan([GroupPlan(name, "svd", (name,), {"rank": min(dense.weight.shape)})], 0, 0)
    original = sharefold.convert_(model, plan, calibration=IMAGES, repair=False).original
    clean = torch.randn(32, 5, 5, dense.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = original.get_submodule(name)(clean)
        at = visited(original, model, None, [0.5 * clean], [y], name)
        assert len(at.samples) == 32 * 25
        own_factors(at, at.samples, plan.groups[0], ridge=1e-9)
        composed = model.get_submodule(name).compose().reshape_as(dense.weight)  # type: ignore[operator,union-attr]
    torch.testing.assert_close(composed, 2 * dense.weight.detach(), rtol=1e-3, atol=1e-3)


def test_shared_dense_and_wide_layers_keep_their_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, plan = converted("spatial", 4)
    layer = model.get_submodule(NAME)
    assert has_own_factors(layer, plan)
    assert not has_own_factors(original.get_submodule(NAME), plan)
    monkeypatch.setattr("sharefold.repair.own_factors.LARGE_FEATURES", 8)
    assert not has_own_factors(layer, plan)
    monkeypatch.undo()
    shared = net(blocks=2)
    names = (NAME, "stage1.1.conv1")
    group = GroupPlan("g", "basis", names, {"rank": 5})
    sharefold.convert_(shared, Plan([group], 0, 0), calibration=IMAGES, repair=False)
    assert not has_own_factors(shared.get_submodule(NAME), group)


def test_refit_solves_them_when_it_is_told_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept, whatever images that decide say: the shared prefix is exact here and leaves nothing to gain."""
    falling = iter([1.0, 0.5, 1.0, 0.5])
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(falling))
    errors = iter([0.5, 1.0])  # of the factors solved again, and of those that there were
    monkeypatch.setattr(refit_module._Task, "error", lambda _: next(errors))
    original, model, plan = converted("spatial", 4)
    before = model.get_submodule(NAME).vertical.clone()  # type: ignore[operator,union-attr]
    without = copy.deepcopy(model)
    assert done_by(Refit(), work_of(original, without, IMAGES, HELD_OUT)).kept
    assert torch.equal(without.get_submodule(NAME).vertical, before)  # type: ignore[arg-type]
    record = done_by(Refit(), work_of(original, model, IMAGES, HELD_OUT, [plan]))
    assert record.kept and record["steps"] == {NAME: 1.0}
    assert not torch.equal(model.get_submodule(NAME).vertical, before)  # type: ignore[arg-type]
