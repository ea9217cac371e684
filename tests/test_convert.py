"""Conversion of small networks of every kind: exactness at full rank, honest errors, refusals that change nothing."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from networks import BLOCKS, images, logits, net
from torch import Tensor, nn

import sharefold
from sharefold.calibration import statistics
from sharefold.calibration.calibrate import calibrate
from sharefold.calibration.parts import parts_of
from sharefold.errors import SharefoldError
from sharefold.graph import analyze, find_groups
from sharefold.layers import SharedConv, banks, shared_layers
from sharefold.measure import agreement
from sharefold.plans import GroupPlan, Plan

KINDS = list(BLOCKS)
CALIBRATION = images()
FITTED = CALIBRATION[parts_of(len(CALIBRATION)).fit]


def full_plan(model: nn.Module, method: str) -> Plan:
    """A plan for every group of isomorphic layers, with options at which ``method`` loses nothing."""
    graph = analyze(model, CALIBRATION[:1])
    plans = []
    for group in find_groups(graph):
        outputs, inputs, height, width = group.weight_shape
        features, layers = inputs * height * width, len(group.members)
        if (method in ("svd", "spatial") and group.groups > 1) or (method == "spatial" and height * width == 1):
            continue
        if method == "cluster-layer" and group.groups > 1:
            continue
        options = {
            "basis": {"rank": min(features, layers * outputs)},
            "hybrid": {"rank": min(features, layers * outputs), "own": 1},
            "svd": {"rank": min(features, outputs)},
            "spatial": {"rank": min(inputs * height, outputs * width)},
            "cluster-layer": {"count": layers},
        }[method]
        plans.append(GroupPlan(group.name, method, group.members, options))
    return Plan(plans, 0, 0, "full rank")


# Grouped convolutions have no low-rank form here, and 1x1 kernels nothing to split.
NO_FORM = {
    ("grouped", "svd"), ("grouped", "spatial"), ("grouped", "cluster-layer"), ("depthwise", "spatial"), ("convnext", "spatial"),
}  # fmt: skip
FULL = ("basis", "hybrid", "svd", "spatial", "cluster-layer")
FULL_RANK = [pair for pair in itertools.product(KINDS, FULL) if pair not in NO_FORM]


@pytest.mark.parametrize(("kind", "method"), sorted(NO_FORM))
def test_what_has_no_form_is_not_planned(kind: str, method: str) -> None:
    assert full_plan(net(kind), method).groups == []


@pytest.mark.parametrize(("kind", "method"), FULL_RANK)
def test_full_rank_is_the_original(kind: str, method: str) -> None:
    model = net(kind, blocks=2)
    plan = full_plan(model, method)
    before = logits(model)
    done = sharefold.convert_(model, plan, calibration=CALIBRATION, repair=False)
    assert shared_layers(model).keys() == {m for g in plan.groups for m in g.members}
    assert all(g.error is not None and g.error < 1e-6 for g in done.plan.groups)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=2e-3)
    found = agreement(done.original, model, CALIBRATION)
    assert found.top1 == 1.0 and found.kl < 1e-5 and math.isnan(done.agreement)  # so few images are not reported on


def test_equal_layers_lose_nothing_when_averaged() -> None:
    model = net()
    first = model.stage2[0].conv1.weight.data
    for block in model.stage2:
        block.conv1.weight.data.copy_(first), block.conv2.weight.data.copy_(first)
    names = tuple(f"stage2.{i}.conv{j}" for i in range(3) for j in (1, 2))
    before = logits(model)
    params = sum(p.numel() for p in model.parameters())
    done = sharefold.convert_(
        model, Plan([GroupPlan("s", "average", names)], 0, 0), calibration=CALIBRATION, repair=False
    )
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert done.plan.groups[0].error == pytest.approx(0, abs=1e-9)
    assert done.plan.params_after == params - 5 * first.numel() == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(banks(model)["s"].weight.detach(), first)


@torch.no_grad()
def output_error(dense: nn.Module, shared: nn.Module, name: str, norm: str) -> float:
    """Relative centred error of a layer's scaled outputs, on the inputs that the dense network gives it."""
    inputs: list[Tensor] = []
    handle = dense.get_submodule(name).register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    dense(FITTED)
    handle.remove()
    batch_norm = dense.get_submodule(norm)
    scale = (batch_norm.weight * torch.rsqrt(batch_norm.running_var + batch_norm.eps)).view(1, -1, 1, 1)
    y = dense.get_submodule(name)(inputs[0]) * scale
    z = shared.get_submodule(name)(inputs[0]) * scale
    y, z = (t - t.mean((0, 2, 3), keepdim=True) for t in (y, z))
    return float((y - z).square().sum() / y.square().sum())


ANY_GROUPS = ("basis", "hybrid", "average", "tied", "cluster-filter", "cluster-kernel")


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, method) for kind in ("residual", "grouped") for method in ANY_GROUPS),
     *(("residual", method) for method in ("svd", "spatial", "tucker"))],
)  # fmt: skip
def test_reported_errors_are_those_of_the_layers_outputs(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "LARGEST_SHARE", 1e-3)
    model = net(kind)
    options = {"basis": {"rank": 14}, "hybrid": {"rank": 6, "own": 2},
               "svd": {"rank": 3}, "spatial": {"rank": 5}, "tucker": {"rank": 9, "width": 5},
               "cluster-filter": {"count": 20}, "cluster-kernel": {"count": 12}}.get(method, {})  # fmt: skip
    names = tuple(f"stage2.{i}.conv{j}" for i in range(3) for j in (1, 2))
    done = sharefold.convert_(
        model, Plan([GroupPlan("s", method, names, options)], 0, 0), calibration=CALIBRATION, repair=False
    )
    errors = [output_error(done.original, model, name, name.replace("conv", "bn")) for name in names]
    reported = done.plan.groups[0].error
    assert reported is not None and reported > 0.01
    assert reported == pytest.approx(sum(errors) / len(errors), rel=0.02)


def test_dense_copy_is_untouched_and_original_is_returned() -> None:
    model = net()
    state = copy.deepcopy(model.state_dict())
    cal = calibrate(model, images(200))
    plan = sharefold.plan(model, budget="50%", calibration=cal, method=("basis", "svd"))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    done = sharefold.convert_(model, plan, calibration=cal)
    assert all(torch.equal(done.original.state_dict()[key], value) for key, value in state.items())
    assert not shared_layers(done.original) and shared_layers(model)
    found = agreement(done.original, model, cal.report_images)
    assert done.report_images == len(cal.report_images) == 50
    assert (found.top1, found.kl) == (pytest.approx(done.agreement), pytest.approx(done.kl, rel=1e-4, abs=1e-7))


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_network(kind: str) -> None:
    one, two = net(kind, blocks=2), net(kind, blocks=2)
    method = "auto" if kind == "residual" else ("basis", "svd", "fold")
    for model in (one, two):
        plan = sharefold.plan(model, budget="60%", calibration=CALIBRATION, method=method)
        sharefold.convert_(model, plan, calibration=CALIBRATION)
    assert torch.equal(logits(one), logits(two))


def test_repair_does_not_raise_the_divergence() -> None:
    model = net(blocks=4)
    plan = sharefold.plan(model, budget="35%", calibration=CALIBRATION, method=("basis", "svd"))
    plain, repaired = copy.deepcopy(model), copy.deepcopy(model)
    without = sharefold.convert_(plain, plan, calibration=CALIBRATION, repair=False)
    done = sharefold.convert_(repaired, plan, calibration=CALIBRATION)
    views = calibrate(model, CALIBRATION).decide_views
    before, after = (agreement(done.original, network, views).kl for network in (plain, repaired))
    assert after <= before and without.steps == {} and set(done.steps) == {"scale", "refit", "norms", "head"}
    assert done.steps["scale"]["kl_before"] == pytest.approx(before, rel=1e-4, abs=1e-8)


def test_views_stand_beside_the_decide_images() -> None:
    model, given = net(blocks=2), images(60)
    plain = given[parts_of(60).decide]
    views = calibrate(model, given).decide_views
    assert torch.equal(views[:9], plain) and torch.equal(views, calibrate(model, given).decide_views)
    apart = (views[9:, None] - plain[None]).flatten(2).norm(dim=2)
    assert bool((apart.argmin(1) == torch.arange(9)).all()) and bool((apart.amin(1) > 1e-3).all())


def test_views_alone_decide_where_the_network_knows_the_images_by_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(300)
    plain = given[parts_of(300).decide]
    for known in (False, True):
        monkeypatch.setattr("sharefold.calibration.calibrate.seen_before", lambda *_, known=known: known)
        views = calibrate(net(blocks=2), given).decide_views
        assert len(views) == 2 * len(plain) and torch.equal(views[: len(plain)], plain) == (not known)


def test_moments_are_taken_from_the_dense_network_alone() -> None:
    """Solutions do not depend on which groups were converted before."""
    model = net()
    names = [tuple(f"stage{s}.{i}.conv{j}" for i in range(3) for j in (1, 2)) for s in (1, 2)]
    both = Plan([GroupPlan(f"g{i}", "basis", n, {"rank": 9}) for i, n in enumerate(names)], 0, 0)
    one = Plan([both.groups[1]], 0, 0)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    sharefold.convert_(first, both, calibration=CALIBRATION, repair=False)
    sharefold.convert_(second, one, calibration=CALIBRATION, repair=False)
    for name in names[1]:
        assert torch.equal(first.get_submodule(name).weight, second.get_submodule(name).weight)


MEMBERS = ("stage2.0.conv1", "stage2.1.conv1")


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (GroupPlan("g", "basis", ("stage2.0.conv1", "nowhere"), {"rank": 2}), "names layer 'nowhere'"),
        (GroupPlan("g", "magic", MEMBERS), "unknown method 'magic'"),
        (GroupPlan("g", "basis", MEMBERS), "do not fit method basis"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": "all"}), "do not fit method basis"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": 6, "pivotted": True}), "basis has no option 'pivotted': did you mean pivoted"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": 6, "size": 2}), "has no option 'size': known are pivoted, rank"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": -1}), "must be rank an integer from 1 to 32"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": 0}), "must be rank"),
        (GroupPlan("g", "basis", MEMBERS, {"rank": 10**30}), "do not fit method basis"),
        (GroupPlan("g", "svd", MEMBERS, {"rank": 17}), "from 1 to 16"),
        (GroupPlan("g", "spatial", MEMBERS, {"rank": 2.5}), "rank': 2.5"),
        (GroupPlan("g", "cluster-layer", MEMBERS, {"count": 3}), "from 1 to 2"),
        (GroupPlan("g", "cluster-kernel", MEMBERS, {"count": True}), "must be count"),
        (GroupPlan("g", "svd", ("stage1.0.conv1", "stage2.0.conv1"), {"rank": 2}), "must be isomorphic"),
        (GroupPlan("g", "basis", ("stage2.0.conv1", "stage2.0.bn1"), {"rank": 2}), "is a BatchNorm2d"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(group: GroupPlan, words: str) -> None:
    model = net()
    before = {name: type(module) for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SharefoldError, match=words) as caught:
        sharefold.convert_(model, Plan([group], 0, 0), calibration=CALIBRATION)
    assert "\n" not in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not hasattr(model, "sharefold_config") and not banks(model)


def test_a_shared_network_is_not_converted_again() -> None:
    model = net()
    plan = Plan([GroupPlan("g", "basis", MEMBERS, {"rank": 4})], 0, 0)
    sharefold.convert_(model, plan, calibration=CALIBRATION, repair=False)
    with pytest.raises(SharefoldError, match="is converted already"):
        sharefold.convert_(model, plan, calibration=CALIBRATION, repair=False)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (torch.zeros(0, 3, 12, 12), "no images"),
        (torch.zeros(4, 1, 12, 12), "1 channels, the model takes 3"),
        (torch.zeros(4, 3, 12, 12, dtype=torch.uint8), "no float tensor"),
        (torch.full((4, 3, 12, 12), float("nan")), "NaN"),
        ([1, 2], "list is no float tensor"),
    ],
)
def test_bad_calibration_images(calibration: object, words: str) -> None:
    model = net()
    for verb in (lambda: sharefold.plan(model, calibration=calibration),
                 lambda: sharefold.convert_(model, Plan([], 0, 0), calibration=calibration)):  # fmt: skip
        with pytest.raises(SharefoldError, match=words):
            verb()


def test_procedural_images_stand_in() -> None:
    model = net(blocks=2)
    cal = calibrate(model)
    assert cal.images.shape[1:] == (3, 12, 12) and len(cal.images) >= 500
    done = sharefold.convert_(model, sharefold.plan(model, "60%", cal, method="svd"), cal, repair=False)
    assert done.plan.size <= 0.6 and any(isinstance(m, SharedConv) for m in model.modules())
    assert torch.isfinite(logits(model)).all()


def test_every_step_goes_on_from_what_the_one_before_it_left() -> None:
    model = net(blocks=4)
    plan = sharefold.plan(model, budget="35%", calibration=CALIBRATION)
    done = sharefold.convert_(model, plan, calibration=CALIBRATION, refine=1)
    steps = [done.steps[name] for name in ("scale", "refit", "norms", "head", "refine")]
    measured = [step for step in steps if "kl_before" in step]  # a classifier that is shared is part of the refit
    assert len(measured) >= 3
    for step, following in itertools.pairwise(measured):
        assert following["kl_before"] == step["kl_after" if step["kept"] else "kl_before"]
    views = calibrate(done.original, CALIBRATION).decide_views
    assert agreement(done.original, model, views).kl == pytest.approx(steps[-1]["kl_after"], rel=1e-3, abs=1e-7)


def test_every_modules_own_mode_comes_back() -> None:
    model = net(blocks=2).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    plan = Plan([GroupPlan("g", "basis", ("stage1.0.conv1", "stage1.1.conv1"), {"rank": 4})], 0, 0)
    done = sharefold.convert_(model, plan, calibration=images(64), refine=1)
    assert any(step["kept"] for step in done.steps.values())
    found = {name: module.training for name, module in model.named_modules()}
    assert {name: found[name] for name in modes} == modes


def test_a_network_that_shares_nothing_is_neither_repaired_nor_refined() -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(sharefold.SharefoldWarning, match="not refined: nothing was shared"):
        done = sharefold.convert_(model, Plan([], 0, 0), calibration=images(200), refine=5)
    assert done.steps.keys() == {"scale", "refit", "norms", "head", "refine"}
    assert all(not step["kept"] and "nothing was shared" in step["reason"] for step in done.steps.values())
    assert done.agreement == 1.0 and done.kl == pytest.approx(0.0, abs=1e-6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("said", [False, True])
def test_a_network_of_ones_own_takes_images_of_the_size_that_it_was_shown(said: bool) -> None:
    """Later verbs resize image files to what the file says: 224 x 224 had been made up."""
    torch.manual_seed(0)
    convs = nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    if said:
        model.pretrained_cfg = {"input_size": (4, 12, 12), "mean": (0.1,) * 4}
    plan = Plan([GroupPlan("g", "svd", ("2",), {"rank": 2})], 0, 0)
    sharefold.convert_(model.eval(), plan, torch.randn(10, 4, 20, 24), repair=False)
    found = model.sharefold_config.pretrained_cfg
    assert found["input_size"] == ((4, 12, 12) if said else (4, 20, 24))
    assert found["mean"] == pytest.approx((0.1 if said else 0.449,) * 4, abs=1e-3) and len(found["std"]) == 4
