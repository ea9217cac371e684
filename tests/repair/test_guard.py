"""One guard: a step stays only where the divergence falls, else every bit comes back; and the record says what happened."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from networks import images, net
from repair_works import work_of
from torch import nn

from sharefold.measure import agreement
from sharefold.outputs import Comparison
from sharefold.repair.guard import Guard
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Work, repaired

IMAGES = images(20, 4)


def told(monkeypatch: pytest.MonkeyPatch, *divergences: float) -> Iterator[float]:
    """Guards are told these divergences in turn; gives what is left of them."""
    left = iter(divergences)
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(left))
    return left


def guarded(now: float | None = None) -> tuple[Guard, nn.Linear, dict[str, torch.Tensor]]:
    model = nn.Linear(2, 2)
    return Guard(Comparison(model, torch.zeros(1, 2)), now), model, copy.deepcopy(model.state_dict())


def doubles(model: nn.Module) -> Mapping[str, Any]:
    with torch.no_grad():
        model.weight.mul_(2)
    return {"factor": 2}


def test_its_divergence_is_that_of_the_images() -> None:
    original, model = net(), net()
    with torch.no_grad():
        model.stage1[0].conv1.weight.mul_(2)
    guard = Guard(Comparison(original, IMAGES))
    assert guard.current(model) == guard.divergence(model) == agreement(original, model, IMAGES).kl > 0


def test_what_lowers_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    left = told(monkeypatch, 0.5, 0.3, 0.2)
    guard, model, before = guarded()
    first = guard.attempt(model, "one", lambda: doubles(model))
    second = guard.attempt(model, "two", lambda: doubles(model))  # goes on from .3, which is not measured again
    assert (first.kept, first.kl_before, first.kl_after) == (True, 0.5, 0.3)
    assert (second.kept, second.kl_before, second.kl_after) == (True, 0.3, 0.2)
    assert guard.current(model) == 0.2 and not list(left)
    assert torch.equal(model.weight, 4 * before["weight"])


@pytest.mark.parametrize("after", [0.5, 0.7, math.inf, math.nan], ids=["equal", "higher", "infinite", "not a number"])
def test_what_does_not_is_undone_bit_for_bit(after: float, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 0.5, after)
    guard, model, before = guarded()
    record = guard.attempt(model, "one", lambda: doubles(model))
    assert not record.kept and record.kl_before == 0.5 and record.details == {"factor": 2} and record.reason == ""
    assert record.kl_after == pytest.approx(after, nan_ok=True)
    assert guard.current(model) == 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_buffers_are_undone_and_parameters_stay_the_same_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 0.5, 0.6)
    model = nn.BatchNorm1d(2)
    objects = [*model.parameters(), *model.buffers()]

    def change() -> Mapping[str, Any]:
        model.train()(torch.randn(4, 2))
        with torch.no_grad():
            model.weight.mul_(2)
        return {}

    assert not Guard(Comparison(model, torch.zeros(1, 2))).attempt(model, "one", change).kept
    fresh = nn.BatchNorm1d(2).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(objects, [*model.parameters(), *model.buffers()], strict=True))


def test_a_step_without_a_solution_is_undone_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    left = told(monkeypatch, 0.5)
    guard, model, before = guarded()
    record = guard.attempt(model, "one", lambda: None if doubles(model) else {})
    assert record.to_dict() == {"kept": False, "reason": "it has no finite solution", "kl_before": 0.5, "images": 1}
    assert not list(left) and torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_undoes_the_step_and_goes_on(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 0.5)
    guard, model, before = guarded()

    def change() -> Mapping[str, Any]:
        doubles(model)
        raise error

    with pytest.raises(error):
        guard.attempt(model, "one", change)
    assert torch.equal(model.weight, before["weight"]) and guard.current(model) == 0.5


def test_a_known_divergence_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    left = told(monkeypatch, 0.1)
    guard, model, _ = guarded(now=0.05)
    assert guard.current(model) == 0.05
    assert not guard.attempt(model, "one", lambda: doubles(model)).kept and not list(left)
    guard.settle(0.01)
    assert guard.current(model) == 0.01


def test_what_was_asked_for_stays_and_its_cost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, 0.1, 0.4)
    guard, model, before = guarded()
    record = guard.watch(model, "store", lambda: doubles(model))
    assert record.to_dict() == {"kept": True, "kl_before": 0.1, "kl_after": 0.4, "images": 1, "factor": 2}
    assert torch.equal(model.weight, 2 * before["weight"]) and guard.current(model) == 0.4


def test_a_step_that_has_judged_itself_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    left = told(monkeypatch, 0.5)
    guard, model, before = guarded()

    def change() -> StepRecord:
        doubles(model)
        guard.settle(0.2)
        return StepRecord("two", True, "", 0.5, 0.2)

    assert guard.attempt(model, "one", change).name == "two" and not list(left)
    assert torch.equal(model.weight, 2 * before["weight"]) and guard.current(model) == 0.2


def test_repairs_run_in_order_and_those_that_do_not_apply_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Step:
        def __init__(self, name: str, reason: str) -> None:
            self.name, self.reason = name, reason

        def refusal(self, work: Work) -> str:
            return self.reason

        def run(self, work: Work) -> Mapping[str, Any]:
            ran.append(self.name)
            return {"network": work.model is model}

    model = net()
    work = work_of(net(), model, IMAGES, images(4))
    told(monkeypatch, 0.5, 0.4, 0.6)
    records = repaired(work, [Step("a", ""), Step("b", "there is none"), Step("c", "")])
    assert ran == ["a", "c"] and [record.name for record in records] == ["a", "b", "c"]
    assert [record.to_dict() for record in records] == [
        {"kept": True, "kl_before": 0.5, "kl_after": 0.4, "images": 4, "network": True},
        {"kept": False, "reason": "there is none"},
        {"kept": False, "kl_before": 0.4, "kl_after": 0.6, "images": 4, "network": True},
    ]


def test_a_record_is_a_mapping_of_what_it_knows() -> None:
    record = StepRecord("refit", True, "", 0.5, 0.25, 1.5, {"layers": 3})
    assert dict(record) == record.to_dict() == {"kept": True, "kl_before": 0.5, "kl_after": 0.25, "layers": 3}
    assert record["layers"] == 3 and len(record) == 4 and "reason" not in record and record.get("reason", "-") == "-"
    assert json.loads(json.dumps(record.to_dict())) == record.to_dict()
    idle = StepRecord("norms", False, "there are none")
    assert dict(idle) == {"kept": False, "reason": "there are none"}
    zero = StepRecord("head", False, "", 0.0, 0.0)
    assert dict(zero) == {"kept": False, "kl_before": 0.0, "kl_after": 0.0}  # nothing measured is not the same as 0
    with pytest.raises(AttributeError):
        record.kept = False  # type: ignore[misc]
