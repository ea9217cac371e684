"""Coefficients behind a ReLU: what counts as one, and that every round lowers the error behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import images, made_once, net
from repair_works import done_by, work_of
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn

import sharefold
from sharefold.graph import analyze
from sharefold.layers import Bank, BasisConv, add_bank, form_of
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import coefficients
from sharefold.repair import rectified as module
from sharefold.repair import refit as refit_module
from sharefold.repair.guard import Guard
from sharefold.repair.lockstep import Visited, Wanted, walk
from sharefold.repair.refit import Refit
from sharefold.repair.samples import Samples

FITTING, HELD_OUT = images(40, 3), images(20, 4)


class One(nn.Module):
    """A convolution, a norm, and whatever ``end`` does with its output and the input."""

    def __init__(self, norm: nn.Module, end: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.end = nn.Conv2d(4, 4, 3, padding=1, bias=False), norm, end
        self.drop, self.relu, self.relu6, self.gelu = nn.Dropout(0.5), nn.ReLU(), nn.ReLU6(), nn.GELU()
        self.skip, self.pad, self.down = nn.Identity(), nn.ZeroPad2d(0), nn.Conv2d(4, 4, 1)
        self.leaky = nn.LeakyReLU(0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, self.norm(self.conv(x)), x)


def traced(model: nn.Module) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return m is not model

    return Tracer().trace(model)


def come_to(model: One, x: Tensor, norm: str | None = "norm") -> Visited:
    """The convolution of a :class:`One` and what a walk with ``x`` saw of it."""
    form = form_of(model.conv)
    assert form is not None
    seen: list[Visited] = []
    walk(traced(model), model, model, x, {"conv": Wanted(form, norm, rectified=True)}, seen.append)
    (only,) = seen
    return only


def found(norm: nn.Module, end: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Visited | None:
    """The convolution of a :class:`One`, if a ReLU was seen behind it."""
    at = come_to(One(norm, end).eval(), torch.randn(2, 4, 5, 5))
    assert at.rectifier is not None or at.samples.given is at.samples.wanted is None
    return at if at.rectifier is not None and at.rectifier.rectified else None


@pytest.mark.parametrize(
    ("end", "added"),
    [
        (lambda m, y, x: m.relu(y), False),
        (lambda m, y, x: torch.relu(y), False),
        (lambda m, y, x: F.relu(m.drop(y)), False),
        (lambda m, y, x: m.relu6(y), False),
        (lambda m, y, x: F.relu6(m.drop(y) + x), True),
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
    assert seen is not None and (seen.samples.given is not None) is added is (seen.samples.wanted is not None)
    x, y = seen.samples.x.reshape(-1, 4, 9), seen.samples.y
    shortcut = x[:, :, 4] if added else torch.zeros_like(y)  # a patch's centre is what the input adds at its position
    front = front_of(seen)
    expected = norm.eval()(y[:, :, None, None])[:, :, 0, 0] + shortcut
    torch.testing.assert_close(front.target[0].T, expected)
    torch.testing.assert_close((front.scale * y.T + front.offset)[0].T, expected)


def front_of(at: Visited) -> module.Front:
    """What the refit sees in front of the ReLU behind a shared layer in the convolution's place."""
    model = copy.deepcopy(at.model)
    form = form_of(at.layer)
    assert form is not None and isinstance(model, One)
    basis = torch.randn(2, 4, 3, 3)
    layer = BasisConv(form, torch.randn(4, 2), add_bank(model, "group", Bank({"basis": basis}, uses=1)))
    model.conv = layer  # type: ignore[assignment]
    return refit_module._Task(replace(at, model=model), layer, at.samples, at.samples)._front(at.samples)


def test_an_activation_inside_of_the_norm_is_seen() -> None:
    seen = found(BatchNormAct2d(4), lambda m, y, x: y + x)
    assert seen is not None and seen.samples.given is None
    assert found(BatchNormAct2d(4, act_layer=nn.ReLU6), lambda m, y, x: y) is not None
    assert found(BatchNormAct2d(4, act_layer=nn.SiLU), lambda m, y, x: m.relu(y)) is None
    plain = found(BatchNormAct2d(4, apply_act=False), lambda m, y, x: m.relu(y + x))
    assert plain is not None and plain.samples.given is not None


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


@pytest.mark.parametrize("end", [lambda m, y, x: y + x, lambda m, y, x: m.gelu(x + m.drop(y))])
def test_an_addition_without_a_relu_behind_gives_the_shortcut_alone(end: Callable) -> None:
    at = come_to(One(nn.BatchNorm2d(4), end).eval(), torch.randn(2, 4, 5, 5))
    assert at.rectifier is not None and not at.rectifier.rectified
    assert at.samples.given is not None and torch.equal(at.samples.given, at.samples.x.reshape(-1, 4, 9)[:, :, 4])


def test_a_layer_that_is_added_aims_at_what_the_sum_should_be() -> None:
    """Its output that is aimed at, behind the norm, plus the shortcut as the network now has it, is the original's sum."""
    norm = nn.BatchNorm2d(4)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2.0)
        norm.weight[1] = 3e-2  # what this channel says is hardly heard
    at = come_to(One(norm, lambda m, y, x: y + x).eval(), torch.randn(2, 4, 5, 5))
    plain = at.samples
    assert plain.given is not None and plain.wanted is not None
    damaged = replace(plain, given=plain.given + 0.3 * torch.randn_like(plain.given))
    aim = refit_module._with_addend(replace(at, samples=damaged)).y
    given, heard = damaged.given, torch.tensor([True, False, True, True])
    assert given is not None

    def behind(y: Tensor) -> Tensor:
        return norm.eval()(y[:, :, None, None])[:, :, 0, 0]

    torch.testing.assert_close((behind(aim) + given)[:, heard], (behind(plain.y) + plain.wanted)[:, heard])
    assert torch.equal(aim[:, ~heard], plain.y[:, ~heard])
    with_relu = come_to(One(norm, lambda m, y, x: m.relu(y + x)).eval(), torch.randn(2, 4, 5, 5))
    assert refit_module._with_addend(with_relu) is with_relu.samples


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
    given = x.clone()
    at = come_to(model, x)
    assert torch.equal(x, given) and at.rectifier is None
    with torch.no_grad():
        patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 1, 36)
        rows = model.conv(x).flatten(2).transpose(1, 2).flatten(0, 1)
    order = torch.cdist(at.samples.x[:, 0], patches[:, 0]).argmin(1)
    assert order.sort().values.equal(torch.arange(50)) and torch.equal(at.samples.x, patches[order])
    torch.testing.assert_close(at.samples.y, rows[order])


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
    """Refits ``model`` on FITTING with hardly a pull and by whole steps, and keeps it, whatever held-out images say."""
    monkeypatch.setattr(module, "ROUNDS", rounds)
    monkeypatch.setattr(coefficients, "RIDGES", (1e-9,))
    monkeypatch.setattr(refit_module, "best_step", lambda *_: 1.0)
    monkeypatch.setattr(refit_module, "best_step_behind", lambda *_: 1.0)
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
    real, errors = refit_module._Task._front, []

    def with_own_shortcut(task: refit_module._Task, samples: Samples) -> module.Front:
        return real(task, replace(samples, wanted=samples.given))

    for rounds, front in ((0, real), (4, with_own_shortcut), (4, real)):
        trial = copy.deepcopy(model)
        monkeypatch.setattr(refit_module._Task, "_front", front)
        refitted(done.original, trial, rounds, monkeypatch)
        block, outputs = names[2].rpartition(".")[0], []
        for network in (done.original, trial):
            network.get_submodule(block).register_forward_hook(lambda m, args, out, seen=outputs: seen.append(out))
            with torch.no_grad():
                network.eval()(FITTING)
        errors.append(float((outputs[0] - outputs[1]).square().mean()))
    without, own_shortcut, original_shortcut = errors
    assert original_shortcut < 0.98 * own_shortcut < 0.98**2 * without, errors


def test_a_layer_without_a_relu_behind_it_gets_the_variance_of_its_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "RIDGES", (1e-9,))
    monkeypatch.setattr(refit_module, "best_step", lambda *_: 1.0)
    at = come_to(One(nn.BatchNorm2d(4), lambda m, y, x: m.gelu(y)).eval(), torch.randn(40, 4, 5, 5))
    noisy = replace(at.samples, x=at.samples.x + 0.8 * torch.randn_like(at.samples.x))
    task = refit_module._Task(at, at.model.conv, noisy, noisy)
    task.refit()
    responses = task._responses(noisy)
    wanted = noisy.y.T.double()
    shrunk = task.map(responses)[0].double()
    task.restore()
    restored = task.map(responses)[0].double()
    assert bool((shrunk.var(1) < 0.9 * wanted.var(1)).all())
    torch.testing.assert_close(restored.var(1), wanted.var(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(restored.mean(1), shrunk.mean(1), rtol=1e-3, atol=1e-5)


def test_layers_without_a_relu_behind_them_keep_their_linear_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net("convnext", blocks=3)
    methods = ("basis", "hybrid", "svd")
    plan = sharefold.plan(model, budget="60%", calibration=FITTING, method=methods, exclude="stem|down")
    done = sharefold.convert_(model, plan, calibration=FITTING, repair=False)
    networks = [copy.deepcopy(model) for _ in range(2)]
    for rounds, network in zip((0, 4), networks, strict=True):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        done_by(Refit(), work_of(done.original, network, FITTING, HELD_OUT))
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, networks[1].state_dict()[name]), name
