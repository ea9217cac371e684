"""One calibration: it belongs to its network, measures each thing once, and nobody outside writes into it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import images, net, same, state
from other_device import other_device
from torch import Tensor, nn

import sharefold
from sharefold.calibration.calibrate import Calibration, calibrate
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.graph import analysis
from sharefold.methods import METHODS
from sharefold.outputs import Comparison
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.refine import refine
from sharefold.store import quantize_

IMAGES = images(40, 3)
CONFIG = {"base": None}
QUICK = ("basis", "svd", "fold")
PLAN = Plan([GroupPlan("g", "basis", ("stage1.0.conv1", "stage1.1.conv1"), {"rank": 6})], 0, 0)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The networks whose graphs were read, but for those that are left of them when channels are folded."""
    seen: list[nn.Module] = []
    real, whole = analysis._trace, sum(p.numel() for p in net(blocks=2).parameters())

    def noted(model: nn.Module, *rest: Any) -> Any:
        if sum(p.numel() for p in model.parameters()) == whole:
            seen.append(model)
        return real(model, *rest)

    monkeypatch.setattr(analysis, "_trace", noted)
    return seen


# Measured once ---------------------------------------------------------------------------------------------------------


def test_plan_and_conversion_trace_and_collect_once(traces: list[nn.Module]) -> None:
    model = net(blocks=2)
    cal = sharefold.calibrate(model, IMAGES)
    assert len(traces) == 1
    plan = sharefold.plan(model, "50%", cal, method=QUICK)
    assert plan.groups and cal.statistics.passes == 1
    sharefold.convert_(model, plan, cal, config=CONFIG)
    assert len(traces) == 1 and cal.statistics.passes == 1


def test_images_instead_are_measured_by_each_verb(traces: list[nn.Module]) -> None:
    model = net(blocks=2)
    plan = sharefold.plan(model, "50%", IMAGES, method=QUICK)
    sharefold.convert_(model, plan, IMAGES, config=CONFIG)
    assert len(traces) == 2


def test_nothing_is_measured_before_it_is_asked_for() -> None:
    cal = calibrate(net(), IMAGES)
    assert not {"statistics", "comparable", "decide_views"} & vars(cal).keys()
    assert cal.statistics is cal.statistics and cal.statistics.passes == 0
    cal.statistics.moments(["stem"])
    cal.statistics.moments(["stem"])
    assert cal.statistics.passes == 1


def test_the_same_result_as_without_one() -> None:
    one, two = net(blocks=2), net(blocks=2)
    given = images(200, 3)
    cal = calibrate(one, given)
    first = sharefold.plan(one, "50%", cal, method=QUICK)
    second = sharefold.plan(two, "50%", given, method=QUICK)
    assert first == second
    done = [sharefold.convert_(one, first, cal, config=CONFIG), sharefold.convert_(two, second, given, config=CONFIG)]
    assert done[0].kl == done[1].kl > 0 and same(state(one), state(two))


def test_every_group_is_solved_once_whatever_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[str] = []
    kind = type(METHODS["basis"])
    real = kind.fit
    monkeypatch.setattr(kind, "fit", lambda self, m, g, s, plan: (fits.append(plan.name), real(self, m, g, s, plan))[1])
    dense = net()
    cal = calibrate(dense, IMAGES)
    networks = [copy.deepcopy(dense) for _ in range(2)]
    for model in networks:
        sharefold.convert_(model, PLAN, cal, refine=1, config=CONFIG)  # repairs write into copies of what was solved
    assert fits == ["g"] and same(*map(state, networks))
    other = Plan([GroupPlan("g", "basis", PLAN.groups[0].members, {"rank": 5})], 0, 0)
    sharefold.convert_(copy.deepcopy(dense), other, cal, repair=False, config=CONFIG)
    assert fits == ["g", "g"]


def test_solutions_are_kept_by_key_and_forgotten_on_request() -> None:
    cal = calibrate(net(), IMAGES)
    solved: list[str] = []

    def solve(key: str) -> Callable[[], str]:
        return lambda: (solved.append(key), key.upper())[1]

    assert [cal.solution(key, solve(key)) for key in "abab"] == ["A", "B", "A", "B"] and solved == ["a", "b"]
    assert cal.is_solved("a") and not cal.is_solved("c")
    cal.forget_solutions(but=["b", "c"])
    assert not cal.is_solved("a") and cal.is_solved("b")
    cal.forget_solutions()
    assert not cal.is_solved("b")


# Of one network --------------------------------------------------------------------------------------------------------


def test_another_network_is_refused_in_one_line_and_left_alone() -> None:
    cal = calibrate(net(), IMAGES)
    nudged = net()
    with torch.no_grad():
        nudged.stage2[1].conv2.weight[0, 0, 0, 0] += 1e-3
    moved = net()
    moved.stage2[1].bn1.running_var.mul_(1.5)
    larger = net()
    larger.more = nn.Linear(2, 2)
    with other_device() as device:
        elsewhere = net().to(device)
    cases = [
        (nudged, "stage2.1.conv2.weight differs"), (net(seed=1), "differs"), (net("depthwise"), "differs"),
        (moved, "stage2.1.bn1.running_var differs"),
        (larger, "more.weight differs"), (net().double(), "differs"), (elsewhere, "it is on cpu, the network on meta"),
    ]  # fmt: skip
    for model, words in cases:
        before = dict(model.state_dict())
        for verb in (
            lambda m: sharefold.plan(m, "50%", cal),
            lambda m: sharefold.convert_(m, PLAN, cal, config=CONFIG),
        ):
            with pytest.raises(SharefoldError, match=words) as caught:
                verb(model)
            assert str(caught.value).startswith("calibration: ") and "\n" not in str(caught.value)
        assert model.state_dict().keys() == before.keys() and not hasattr(model, "sharefold_config")


def test_a_converted_network_is_another_one() -> None:
    model = net()
    cal = calibrate(model, IMAGES)
    sharefold.convert_(model, PLAN, cal, repair=False, config=CONFIG)
    with pytest.raises(SharefoldError, match="converted already"):
        sharefold.convert_(model, PLAN, cal, config=CONFIG)


def test_copies_and_weights_that_are_not_numbers_are_the_same_network() -> None:
    model = net()
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    cal = calibrate(net(), IMAGES)
    Calibration(model, IMAGES, cal.graph, cal.example, cal.options).check_model(copy.deepcopy(model).train())


def test_of_another_network_it_keeps_images_and_nothing_measured() -> None:
    cal = calibrate(net(), IMAGES, seed=3)
    cal.statistics.moments(["stem"])
    cal.solution("a", lambda: 1)
    other = cal.of(net(seed=1))
    assert other.images is cal.images and other.graph is cal.graph and other.seed == 3
    assert "statistics" not in vars(other) and not other.is_solved("a") and other.statistics.model is other.original


# Nobody writes into it -------------------------------------------------------------------------------------------------


def test_no_verb_writes_into_it() -> None:
    model = net(blocks=2)
    given = IMAGES.clone()
    cal = calibrate(model, given)
    dense, layers = state(cal.original), copy.deepcopy(cal.graph.layers)
    inside = {name: (type(m), set(vars(m)), len(m._forward_hooks)) for name, m in cal.original.named_modules()}
    plan = sharefold.plan(model, "50%", cal, objective="joint")
    done = sharefold.convert_(model, plan, cal, refine=1, config=CONFIG)
    refine(model, cal, epochs=1)
    quantize_(model, "int6", cal)
    sharefold.plan(copy.deepcopy(cal.original), "30kB", cal)
    assert same(state(cal.original), dense) and torch.equal(given, IMAGES) and torch.equal(cal.images, IMAGES)
    assert {n: (type(m), set(vars(m)), len(m._forward_hooks)) for n, m in cal.original.named_modules()} == inside
    assert cal.graph.layers == layers and not cal.original.training
    assert all(p.requires_grad and p.grad is None for p in cal.original.parameters())
    # Neither does whoever trains what the verbs gave.
    with torch.no_grad():
        for network in (model, done.original):
            for parameter in network.parameters():
                parameter.zero_()
    assert same(state(cal.original), dense)


def test_the_network_may_change_afterwards() -> None:
    model = net()
    cal = calibrate(model.train(), IMAGES)
    dense = state(cal.original)
    with torch.no_grad():
        model.stem.weight.zero_()
    assert model.training and not cal.original.training and same(state(cal.original), dense)


# Its parts -------------------------------------------------------------------------------------------------------------


def test_what_is_fitted_to_is_the_part_fit_and_the_least_certain_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharefold.calibration.sample_selection.FEWEST", 4)
    cal = calibrate(net(), IMAGES)
    chosen, fit = set(cal.statistics.chosen.tolist()), set(cal.parts.fit.tolist())
    assert chosen < fit and len(chosen) == round(len(fit) / 2)
    assert torch.equal(cal.fit_images, IMAGES[cal.parts.fit])
    assert torch.equal(cal.refit_images[cal.refit_parts.fit], IMAGES[cal.statistics.chosen])
    assert torch.equal(cal.refit_images[cal.refit_parts.decide], IMAGES[cal.parts.decide])
    decided = len(cal.parts.decide)
    assert torch.equal(cal.decide_views[:decided], IMAGES[cal.parts.decide]) and len(cal.decide_views) == 2 * decided


class Past(nn.Module):
    """Untraceable, and what a norm reads is read once more past it."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 4)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)
        if mixed:
            self.conv.to(torch.bfloat16)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e9:
            return self.fc(x.mean((2, 3)))
        y = self.conv(x.to(self.conv.weight.dtype)).float()
        return self.fc((torch.relu(self.norm(y)) + y).mean((2, 3)))


class InPlace(nn.Sequential):
    """Untraceable; a ReLU between layer and norm works in place, so that both meet the same tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) < 1e9 else x


def in_place() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    nn.init.normal_(norm.running_mean)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return InPlace(*layers).eval()


@pytest.mark.parametrize("make", [Past, in_place, partial(Past, mixed=True)])
def test_norms_are_fused_only_where_the_network_stays_the_same(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    cal = sharefold.calibrate(model, images(40))
    assert cal.graph.traced == "hooks" and cal.norms == {}
    with torch.no_grad():
        wanted = model(images(40))
    theirs = torch.cat([answers[0] for answers, _ in cal.comparison(images(40)).answers(model)])
    torch.testing.assert_close(theirs, wanted, rtol=1e-5, atol=1e-6)


def test_comparisons_with_norms_and_without_say_the_same() -> None:
    model = net(blocks=2)
    other = net(blocks=2, seed=1)
    cal = sharefold.calibrate(model, images(40))
    assert sum(norm is not None for norm in cal.norms.values()) >= 5
    fused, plain = cal.comparison(images(40)), Comparison(model, images(40), cal.reading, divergence=cal.divergence)
    assert fused.norms and not plain.norms
    assert fused.divergence(other).mean == pytest.approx(plain.divergence(other).mean, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"held_out": -1}, "held_out=-1"), ({"held_out": 2.5}, "held_out=2.5"), ({"seed": None}, "seed=None"),
     ({"seed": -1}, "seed=-1"), ({"seed": True}, "seed=True"), ({"seed": 1 << 63}, f"seed={1 << 63}")],
)  # fmt: skip
def test_counts_and_seeds_are_whole_numbers(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SharefoldError, match=f"{message}: must be a whole number from 0"):
        sharefold.calibrate(net(), images(24), **given)


def test_a_seed_beside_a_calibration_is_the_calibrations_own() -> None:
    model = net()
    cal = sharefold.calibrate(model, IMAGES, seed=3)
    with pytest.raises(SharefoldError, match="seed=5: the calibration has its own, 3: give it to calibrate"):
        sharefold.plan(model, "70%", cal, method="svd", seed=5)
    with pytest.raises(SharefoldError, match="seed=None: must be a whole number"):
        sharefold.plan(model, "70%", IMAGES, seed=None)
    same_seed = sharefold.plan(model, "70%", cal, method="svd", seed=3)
    assert same_seed.groups == sharefold.plan(model, "70%", cal, method="svd").groups


def test_images_of_one_colour_are_told() -> None:
    flat = torch.linspace(-1, 1, 72).reshape(24, 3, 1, 1).expand(24, 3, 12, 12).clone()
    with pytest.warns(SharefoldWarning, match="24 of 24 calibration images are of one colour each"):
        sharefold.calibrate(net(), flat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharefold.calibrate(net(), torch.cat([flat[:8], images(16)]))


def test_copies_among_the_images_are_told_where_something_is_reported() -> None:
    given = images(240)
    given[[7, 11, 200]] = given[[3, 3, 5]]
    with pytest.warns(SharefoldWarning, match="3 of 240 calibration images are copies of others"):
        sharefold.calibrate(net(), given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharefold.calibrate(net(), images(240))
        sharefold.calibrate(net(), given[:12])  # of which nothing is reported


class Rearranged(nn.Module):
    """Makes other channels of an image before its first convolution."""

    def __init__(self, first: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.first, self.stem, self.body = first, nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(self.first(x))).mean((2, 3))


@pytest.mark.parametrize(
    ("first", "channels"),
    [
        (nn.PixelUnshuffle(2), 12),
        (lambda x: x.mean(1, keepdim=True), 1),
        (lambda x: torch.cat([x, torch.ones_like(x[:, :2])], 1), 5),
        (lambda x: nn.functional.conv2d(x, torch.ones(4, 3, 1, 1)), 4),
    ],
    ids=["space to depth", "grey", "coordinates", "a stem of its own"],
)
def test_the_first_convolution_does_not_tell_what_the_network_takes(first: Callable[[Tensor], Tensor], channels: int) -> None:
    model = Rearranged(first, channels).eval()
    assert list(sharefold.calibrate(model, torch.randn(8, 3, 12, 12)).graph.layers) == ["stem", "body"]
    if channels != 1:
        with pytest.raises(SharefoldError, match=f"images have 2 channels, the model takes {channels}: convert the images"):
            sharefold.calibrate(model, torch.randn(8, 2, 12, 12))
