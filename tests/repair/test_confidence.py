"""The scale of the logits: restored in front of the repairs, and in every state that they are compared in."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks import images, logits, net
from repair_works import done_by, work_of
from torch import nn

import sharefold
from sharefold.measure import agreement
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import confidence
from sharefold.repair.confidence import WIDEST, Confidence, _best_factor
from sharefold.repair.guard import Guard
from sharefold.repair.partial import Partial
from sharefold.repair.work import Work, repaired

FITTING, HELD_OUT = images(40, 3), images(40, 4)


def weakened(factor: float = 0.4) -> tuple[nn.Module, nn.Module]:
    """A network, and one that says the same less surely."""
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.fc.weight.mul_(factor), model.fc.bias.mul_(factor)
    return original, model


def test_settling_tells_the_divergence_of_what_it_leaves() -> None:
    """From the answers that it has seen; another run gives the same."""
    original, model = weakened()
    with torch.no_grad():
        model.stem.weight.mul_(1.3)
    work = work_of(original, model, FITTING, HELD_OUT)
    scale = Confidence(work)
    assert scale.divergence is None and work.guard.settled(model, scale) == work.guard.divergence(model)
    scale.settle()
    assert scale.divergence is not None and work.guard.settled(model, scale) == scale.divergence
    assert scale.divergence == pytest.approx(work.guard.divergence(model), rel=1e-4) and scale.divergence > 1e-4
    scale.undo()
    assert scale.divergence is None and work.guard.settled(model, scale) == work.guard.divergence(model)


class Shifted(nn.Module):
    """Its logits, changed in place behind the layer that gives them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.body(x)
        logits -= torch.linspace(-2, 2, logits.shape[1])
        return logits


def test_logits_that_are_changed_in_place_are_measured_by_a_run() -> None:
    original, model = (Shifted(one) for one in weakened())
    work = work_of(original, model, FITTING, HELD_OUT)
    scale = Confidence(work)
    assert scale.settle()["output"] != 1 and scale.divergence is None
    assert work.guard.settled(model, scale) == work.guard.divergence(model)


class Twice(nn.Module):
    """Logits, and shares made of them."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.body(x)
        return logits, logits.softmax(1)


def test_of_several_outputs_the_network_is_run_again() -> None:
    """What else hangs on the logits does not become what it was times a number."""
    original, model = (Twice(one) for one in weakened())
    cal = sharefold.calibrate(original, FITTING, outputs="0:logits:axis=1")
    scale = Confidence(Work(cal, model, Plan([], 0, 0), Guard(cal.comparison(HELD_OUT)), cal))
    assert scale.settle() == {"0": pytest.approx(2.5, rel=1e-3)} and scale.divergence is None


@pytest.mark.parametrize("factor", [0.4, 2.5])
def test_the_scale_is_found_and_taken_up_by_the_layer_before_the_logits(factor: float) -> None:
    original, model = weakened(factor)
    work = work_of(original, model, FITTING, HELD_OUT)
    record = done_by(Confidence(work), work)
    assert record["kept"] and record["kl_after"] < 1e-4 < record["kl_before"]
    assert record["factors"] == pytest.approx({"output": 1 / factor}, rel=1e-4)
    torch.testing.assert_close(model.fc.weight, original.fc.weight, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for (n, a), (_, b) in zip(model.named_parameters(), original.named_parameters(), strict=True)
               if not n.startswith("fc."))  # fmt: skip


def test_the_scale_is_found_where_one_batch_is_more_than_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of maps with many classes alone may be; refinement leaves the scale to this."""
    monkeypatch.setattr(confidence, "ENTRIES", 100)
    original, model = weakened(0.4)
    work = work_of(original, model, FITTING, HELD_OUT)
    scale = Confidence(work)
    assert scale.settle() == {"output": pytest.approx(2.5, rel=1e-3)} and scale.divergence is None
    assert work.guard.divergence(model) < 1e-6
    monkeypatch.setattr(confidence, "ENTRIES", 1)  # not one row
    assert scale.settle() == {}


@pytest.mark.parametrize("first", ["regression", "logits:axis=1"])
def test_a_tensor_of_which_logits_are_a_part_is_not_scaled(first: str) -> None:
    original, model = weakened()
    cal = sharefold.calibrate(original, FITTING, outputs=[f"{first}:channels=0-2", "logits:axis=1:channels=2-5"])
    scale = Confidence(Work(cal, model, Plan([], 0, 0), Guard(cal.comparison(HELD_OUT)), cal))
    assert scale.layers == {} and scale.settle() == {}


def test_the_scale_does_not_hang_on_the_last_digits_of_the_logits() -> None:
    """Other processors and thread counts round otherwise; what they find must agree to about as many digits."""
    torch.manual_seed(0)
    wanted, noise = 0.3 * torch.randn(200, 10), torch.randn(200, 10)
    given = 0.05 * torch.randn(200, 10) + 0.1 * wanted
    assert _best_factor(wanted, given) == pytest.approx(_best_factor(wanted, given + 1e-7 * noise), rel=1e-5)


@pytest.mark.parametrize("margin", [5.0, 30.0, 60.0])
def test_the_scale_of_sure_networks_is_found_too(margin: float) -> None:
    """Their shares are ones and zeros in single precision; a factor of 64 would be as good there, and wrong elsewhere."""
    torch.manual_seed(0)
    wanted = torch.randn(400, 10) + margin * torch.eye(10)[torch.randint(10, (400,))] + 100
    assert _best_factor(wanted, 0.7 * wanted) == pytest.approx(1 / 0.7, rel=1e-3)


def test_the_scale_has_bounds_and_needs_logits_that_differ() -> None:
    torch.manual_seed(0)
    wanted = torch.randn(50, 4)
    assert _best_factor(wanted, -wanted) == 1 / WIDEST
    assert _best_factor(1e3 * wanted, wanted) == WIDEST
    assert _best_factor(wanted, torch.ones(50, 4)) is None
    assert _best_factor(wanted, torch.full((50, 4), float("nan"))) is None
    mask = torch.tensor([0, 0, 0, -math.inf])  # of a class that is not to be chosen
    assert _best_factor(wanted + mask, 0.5 * wanted + mask) == pytest.approx(2, rel=1e-4)


def test_a_shared_classifier_is_scaled_by_its_coefficients() -> None:
    original = net()
    model = copy.deepcopy(original)
    sharefold.convert_(model, Plan([GroupPlan("a", "svd", ("fc",), {"rank": 4})], 0, 0), FITTING, repair=False)
    with torch.no_grad():
        model.fc.coefficients.mul_(0.4), model.fc.own_bias.mul_(0.4)
    before = logits(model)
    work = work_of(original, model, FITTING, HELD_OUT)
    record = done_by(Confidence(work), work)
    assert record["kept"]
    torch.testing.assert_close(logits(model), before * record["factors"]["output"], rtol=1e-3, atol=1e-4)


def test_what_is_protected_frozen_or_used_twice_stays() -> None:
    original, model = weakened()
    work = work_of(original, model, FITTING, HELD_OUT)
    assert set(Confidence(work).layers) == {"output"}
    model.fc.weight.requires_grad_(False)
    assert Confidence(work).layers == {} and Confidence(work).refusal(work).startswith("no logits are the output")
    model.fc.weight.requires_grad_(True)
    model.other = nn.Linear(1, 1)
    model.other.weight = model.fc.weight
    assert Confidence(work).layers == {}
    del model.other
    kept = work_of(original, model, FITTING, HELD_OUT)
    kept.plan.exclude = "^fc"
    assert Confidence(kept).layers == {}


class Halving:
    """A repair that mends a layer and weakens the logits, in two parts of which the second does harm."""

    name = "halving"

    def refusal(self, work: Work) -> str:
        return ""

    def run(self, work: Work) -> Mapping[str, Any] | Partial:
        model, original = work.model, work.cal.original
        broken = model.stem.weight.detach().clone()

        @torch.no_grad()
        def keep(count: int) -> None:
            model.stem.weight.copy_(original.stem.weight if count else broken)
            if count == 2:
                model.stem.weight.mul_(-5)

        with torch.no_grad():
            model.fc.weight.mul_(0.3), model.fc.bias.mul_(0.3)
        keep(2)
        return Partial(2, keep, lambda count: {"parts": count})


def test_every_state_of_a_repair_is_compared_at_its_own_scale() -> None:
    original = net()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.stem.weight.mul_(3)
    work = work_of(original, model, FITTING, HELD_OUT)
    (alone,) = repaired(work, [Halving()])
    assert not alone["kept"] or alone["kl_after"] > 1e-2
    model.load_state_dict(copy.deepcopy(original).state_dict())
    with torch.no_grad():
        model.stem.weight.mul_(3)
    work = work_of(original, model, FITTING, HELD_OUT)
    confidence = Confidence(work)
    _, settled = repaired(work, [confidence, Halving()], confidence)
    assert settled["kept"] and settled["parts"] == 1 and settled["kl_after"] < 1e-3
    assert agreement(original, model, HELD_OUT).kl < 1e-3
