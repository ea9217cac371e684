"""Coefficients behind a ReLU: what counts as one, and that every round lowers the error behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from networks import images, made_once, net
from repair_works import done_by, work_of
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

import sharefold
from sharefold.graph import analyze
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import rectified as module
from sharefold.repair import refit as refit_module
from sharefold.repair.guard import Guard
from sharefold.repair.lockstep import Place, walk
from sharefold.repair.rectified import Rectified, rectified
from sharefold.repair.refit import Refit

FITTING, HELD_OUT = images(40, 3), images(20, 4)


class One(nn.Module):
    """A convolution, a norm, and whatever ``end`` does with its output and the input."""

    def __init__(self, norm: nn.Module, end: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, end
        self.drop, self.relu, self.gelu = nn.Dropout(0.5), nn.ReLU(), nn.GELU()
        self.skip, self.pad, self.down = nn.Identity(), nn.ZeroPad2d(0), nn.Conv2d(4, 4, 1)
        self.leaky = nn.LeakyReLU(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, self.norm(self.conv(x)), x)


def traced(model: nn.Module) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return m is not model

    return Tracer().trace(model)


def found(norm: nn.Module, end: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Rectified | None:
    """What :func:`rectified` sees behind the convolution of a :class:`One`."""
    model = One(norm, end).eval()
    seen: list[Rectified | None] = []

    def visit(name: str, place: Place) -> None:
        seen.append(rectified(model, place, "norm", place.student))

    with torch.no_grad():
        walk(traced(model), model, model, [torch.randn(2, 4, 5, 5)], visit, {"conv"})
    return seen[0]


@pytest.mark.parametrize(
    ("end", "added"),
    [
        (lambda m, y, x: m.relu(y), False),
        (lambda m, y, x: torch.relu(y), False),
        (lambda m, y, x: F.relu(m.drop(y)), False),
        (lambda m, y, x: y.relu(), False),
        (lambda m, y, x: m.relu(y + x), True),
        (lambda m, y, x: F.relu(x + m.drop(y)), True),
        (lambda m, y, x: m.relu(y.add_(x)), True),
        (lambda m, y, x: m.relu(y + m.skip(x)), True),  # the shortcut is run after the layers that it skips
        (lambda m, y, x: m.relu(y + m.pad(m.skip(x))), True),
        (lambda m, y, x: m.relu(y + F.pad(x, (0, 0))), True),
    ],
)
def test_a_relu_is_seen_behind_the_norm_and_an_addition(end: Callable, added: bool) -> None:
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2.0)
    seen = found(norm, end)
    assert seen is not None and (seen.addend is not None) is added
    y = torch.randn(3, 4, 2, 2)
    expected = norm.eval()(y)
    assert torch.allclose(seen.scale[:, None, None] * y + seen.shift[:, None, None], expected, atol=1e-5)


def test_an_activation_inside_of_the_norm_is_seen() -> None:
    seen = found(BatchNormAct2d(4), lambda m, y, x: y + x)
    assert seen is not None and seen.addend is None
    assert found(BatchNormAct2d(4, act_layer=nn.SiLU), lambda m, y, x: m.relu(y)) is None
    plain = found(BatchNormAct2d(4, apply_act=False), lambda m, y, x: m.relu(y + x))
    assert plain is not None and plain.addend is not None


@pytest.mark.parametrize(
    "end",
    [
        lambda m, y, x: y,
        lambda m, y, x: m.gelu(y),
        lambda m, y, x: m.relu(y) + y,  # the value passes by the ReLU, too
        lambda m, y, x: y + x,
        lambda m, y, x: m.relu(y + y),
        lambda m, y, x: m.relu(y + 1.0),
        lambda m, y, x: m.relu(torch.add(y, x, alpha=2.0)),
        lambda m, y, x: m.gelu(y + x),
        lambda m, y, x: m.relu(y + x.mean((2, 3), keepdim=True)),
        lambda m, y, x: m.relu(y + m.down(x)),  # may be a layer that is repaired later
        lambda m, y, x: m.relu(y + m.skip(m.down(x))),
    ],
)
def test_anything_else_is_not_taken_for_one(end: Callable) -> None:
    assert found(nn.BatchNorm2d(4), end) is None


@pytest.mark.parametrize(
    "end",
    [
        lambda m, y, x: m.relu(y + F.leaky_relu(x, 0.5, inplace=True)),
        lambda m, y, x: m.relu(y + m.leaky(x)),
        lambda m, y, x: m.relu(y + m.leaky(m.skip(x))),
        lambda m, y, x: m.relu(y + x.mul_(2.0)),
        lambda m, y, x: m.relu(y + x[:, :2].add_(1.0).repeat(1, 2, 1, 1)),
    ],
)
def test_shortcuts_that_work_in_place_wait_for_their_turn(end: Callable) -> None:
    model, x = One(nn.BatchNorm2d(4), end).eval(), torch.randn(2, 4, 5, 5)
    seen: list[tuple[Tensor, Rectified | None]] = []

    def visit(name: str, place: Place) -> None:
        found = rectified(model, place, "norm", place.student)
        seen.append((place.inputs[0].clone(), found))

    with torch.no_grad():
        walk(traced(model), model, model, [x.clone()], visit, {"conv"})
    assert torch.equal(seen[0][0], x) and seen[0][1] is None


def test_norms_that_are_not_affine_in_evaluation_are_left_alone() -> None:
    assert found(nn.GroupNorm(2, 4), lambda m, y, x: m.relu(y)) is None
    assert found(nn.BatchNorm2d(4, track_running_stats=False), lambda m, y, x: m.relu(y)) is None


@made_once
def converted(blocks: int, members: tuple[str, ...], rank: int) -> tuple[nn.Module, nn.Module]:
    """A network of ``blocks`` blocks a stage, and it with one shared basis."""
    model = net(blocks=blocks)
    plan = Plan([GroupPlan("g", "basis", members, {"rank": rank})], 0, 0)
    return sharefold.convert_(model, plan, calibration=FITTING, repair=False).original, model


def refitted(original: nn.Module, model: nn.Module, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refits ``model`` on FITTING with hardly a pull and keeps it, whatever held-out images say."""
    monkeypatch.setattr(module, "ROUNDS", rounds)
    monkeypatch.setattr(refit_module, "RIDGE", 1e-9)
    falling = iter([1.0, 0.0])
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(falling))
    assert done_by(Refit(), work_of(original, model, FITTING, HELD_OUT)).kept


def errors_behind(rounds: int, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Of the first shared layer on the images that it was fitted to: squared error of what should pass the ReLU and of what
    passes it and should not, in front of it; and squared error behind it."""
    original, model = converted(2, ("stage1.0.conv1", "stage1.1.conv1"), rank=4)
    refitted(original, model, rounds, monkeypatch)
    outputs: list[Tensor] = []
    for network in (original, model):
        network.get_submodule("stage1.0.bn1").register_forward_hook(lambda m, args, out: outputs.append(out))
        with torch.no_grad():
            network.eval()(FITTING)
    wanted, found = outputs
    bound = torch.where(wanted > 0, found - wanted, found.relu()).square().mean()
    return float(bound), float((wanted.relu() - found.relu()).square().mean())


def test_every_round_lowers_the_error_of_what_passes_the_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [errors_behind(rounds, monkeypatch) for rounds in (0, 1, 2, 4, 8)]
    bounds = [bound for bound, _ in errors]
    assert bounds == sorted(bounds, reverse=True) and bounds[3] < 0.97 * bounds[0]
    assert errors[3][1] < 0.97 * errors[0][1]


def test_the_last_layer_of_a_block_makes_up_for_errors_of_its_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(blocks=3)
    graph = analyze(model, FITTING[:1])
    names = [name for name in graph.layers if name.endswith("conv2")]
    plan = Plan([GroupPlan("g", "basis", tuple(names[:3]), {"rank": 6})], 0, 0)
    done = sharefold.convert_(model, plan, calibration=FITTING, repair=False)
    errors = []
    for rounds, addend in ((0, Place.teacher), (4, Place.student), (4, Place.teacher)):
        trial = copy.deepcopy(model)
        monkeypatch.setattr(Place, "teacher", addend)
        refitted(done.original, trial, rounds, monkeypatch)
        block, outputs = names[2].rpartition(".")[0], []
        for network in (done.original, trial):
            network.get_submodule(block).register_forward_hook(lambda m, args, out, seen=outputs: seen.append(out))
            with torch.no_grad():
                network.eval()(FITTING)
        errors.append(float((outputs[0] - outputs[1]).square().mean()))
    without, own_shortcut, original_shortcut = errors
    assert original_shortcut < 0.98 * own_shortcut < 0.98**2 * without, errors


def test_layers_without_a_relu_behind_them_keep_their_linear_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("convnext", blocks=3)
    plan = sharefold.plan(model, budget="60%", calibration=FITTING, objective="fisher", exclude="stem|down")
    done = sharefold.convert_(model, plan, calibration=FITTING, repair=False)
    networks = [copy.deepcopy(model) for _ in range(2)]
    for rounds, network in zip((0, 4), networks, strict=True):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        done_by(Refit(), work_of(done.original, network, FITTING, HELD_OUT))
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, networks[1].state_dict()[name]), name
