"""A refit that does harm as a whole goes a part of the way, or keeps its first layers, where that helps."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import images, net
from repair_works import done_by, work_of
from torch import Tensor, nn

import sharefold
from sharefold.layers import shared_layers
from sharefold.measure import agreement
from sharefold.outputs import Comparison
from sharefold.repair import refit as refit_module
from sharefold.repair.guard import Guard
from sharefold.repair.lockstep import Visited
from sharefold.repair.partial import Journal, Partial, best_start, best_way
from sharefold.repair.refit import Refit
from sharefold.repair.step_record import StepRecord

FITTING, HELD_OUT = images(40, 3), images(20, 4)


def test_a_journal_goes_back_and_forth_bit_for_bit() -> None:
    tensors = [torch.randn(3), torch.zeros(2, dtype=torch.long), torch.randn(2)]
    states, journal = [[t.clone() for t in tensors]], Journal()
    for step in range(4):
        with journal.entry(tensors):
            tensors[0].mul_(1 / 3)
            tensors[1][step % 2] += 1
        states.append([t.clone() for t in tensors])
    assert len(journal) == 4
    for count in (4, 1, 3, 0, 0, 4, 2):
        journal.keep(count)
        assert all(torch.equal(t, wanted) for t, wanted in zip(tensors, states[count], strict=True)), count


def test_a_journal_goes_a_part_of_the_way_and_back() -> None:
    tensors = [torch.randn(3), torch.zeros(2, dtype=torch.long)]
    states, journal = [[t.clone() for t in tensors]], Journal()
    for _ in range(3):
        with journal.entry(tensors):
            tensors[0].mul_(1 / 3)
            tensors[1][0] += 1
        states.append([t.clone() for t in tensors])
    for share in (0.25, 0.75):
        journal.go(share)
        torch.testing.assert_close(tensors[0], states[0][0].lerp(states[3][0], share))
        assert torch.equal(tensors[1], states[3][1])
        for count in (3, 1):
            journal.keep(count)
            assert all(torch.equal(t, wanted) for t, wanted in zip(tensors, states[count], strict=True)), (share, count)


@pytest.mark.parametrize(
    ("divergences", "found"),
    [({0.5: 0.6, 0.25: 0.8}, (0.5, 0.6)), ({0.5: 1.2, 0.25: 0.8}, (0.25, 0.8)), ({0.5: 1.2, 0.25: math.nan}, (0, 1.0))],
)
def test_the_best_part_of_the_way(divergences: dict[float, float], found: tuple[float, float]) -> None:
    at: list[float] = []
    partial = Partial(3, lambda _: None, lambda _: {}, at.append)
    assert best_way(partial, lambda: divergences[at[-1]], lambda a, b: a < b, 1.0) == found
    assert best_way(Partial(3, lambda _: None, lambda _: {}), lambda: 0.0, lambda a, b: a < b, 1.0) == (0, 1.0)


@pytest.mark.parametrize(("quarter", "kept"), [(0.3, True), (0.6, False)])
def test_a_part_of_the_way_is_kept_where_it_helps(quarter: float, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four changes of one tensor by one each: its value tells the state."""
    model, journal = nn.Linear(1, 1), Journal()
    torch.nn.init.zeros_(model.weight)

    def change() -> Partial:
        for _ in range(4):
            with journal.entry([model.weight]), torch.no_grad():
                model.weight.add_(1.0)
        return Partial(4, journal.keep, lambda count: {"parts": count}, journal.go)

    guard = Guard(Comparison(model, torch.ones(1, 1)), now=0.5)
    told = iter([0.9, 0.7, quarter, 0.8, 0.8])  # all of it, half of the way, a quarter, the first two changes, the first
    monkeypatch.setattr(Guard, "divergence", lambda self, net: next(told))
    record = guard.attempt(model, "one", change)
    assert record.kept is kept and not list(told) and float(model.weight.detach()) == (1.0 if kept else 0.0)
    if kept:
        assert (record["way"], record["parts"], record["kl_after"]) == (0.25, 4, 0.3)


def test_a_journal_takes_numbers_that_are_none_and_parameters() -> None:
    layer, journal = nn.Linear(2, 2), Journal()
    before = layer.weight.detach().clone()
    with journal.entry(layer.parameters()), torch.no_grad():
        layer.weight.fill_(math.nan)
    journal.keep(0)
    assert torch.equal(layer.weight, before) and layer.weight.grad_fn is None
    journal.keep(1)
    assert layer.weight.isnan().all()


@pytest.mark.parametrize(
    ("count", "divergences", "tried", "found"),
    [
        (8, {4: 0.5, 6: 0.7}, [4, 6], (4, 0.5)),
        (8, {4: 0.5, 6: 0.3}, [4, 6], (6, 0.3)),
        (8, {4: 1.5, 2: 0.9}, [4, 2], (2, 0.9)),
        (8, {4: 1.0, 2: 1.0}, [4, 2], (0, 1.0)),
        (8, {4: math.nan, 2: math.inf}, [4, 2], (0, 1.0)),
        (2, {1: 0.5}, [1], (1, 0.5)),  # three quarters of two are one again
        (3, {1: 0.5, 2: 0.4}, [1, 2], (2, 0.4)),
        (1, {}, [], (0, 1.0)),
        (0, {}, [], (0, 1.0)),
    ],
)
def test_halves_are_tried_first(count: int, divergences: dict[int, float], tried: list[int], found: tuple[int, float]) -> None:
    kept: list[int] = []
    measured: list[int] = []

    def divergence() -> float:
        measured.append(kept[-1])
        return divergences[kept[-1]]

    partial = Partial(count, kept.append, lambda _: {})
    assert best_start(partial, divergence, lambda a, b: a < b, 1.0) == found
    assert measured == tried and kept[-1] == found[0]


def converted() -> tuple[nn.Module, nn.Module, list[str]]:
    """Twelve layers of two banks, in forward order."""
    model = net()
    names = [tuple(f"stage{stage}.{block}.conv{conv}" for block in range(3) for conv in (1, 2)) for stage in (1, 2)]
    groups = [sharefold.GroupPlan(f"g{i}", "basis", members, {"rank": 4}) for i, members in enumerate(names)]
    done = sharefold.convert_(model, sharefold.Plan(groups, 0, 0), calibration=FITTING, repair=False)
    assert len(shared_layers(model)) == 12
    return done.original, model, [*names[0], *names[1]]


def spoiled(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """A refit that ruins the layers ``names``; gives the network's state after every visit, by layer."""
    real, states = refit_module._visit, {}

    def visit(at: Visited, *rest: object) -> float:
        step = real(at, *rest)  # type: ignore[arg-type]
        if at.name in names:
            with torch.no_grad():
                at.layer.coefficients.mul_(-30)
        states[at.name] = {key: tensor.clone() for key, tensor in at.model.state_dict().items()}
        return step

    monkeypatch.setattr(refit_module, "_visit", visit)
    return states


def refitted(original: nn.Module, model: nn.Module) -> StepRecord:
    record = done_by(Refit(), work_of(original, model, FITTING, HELD_OUT))
    assert agreement(original, model, HELD_OUT).kl == pytest.approx(
        record["kl_after" if record.kept else "kl_before"], rel=1e-4
    )
    return record


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(("first_bad", "kept"), [(11, 9), (9, 9), (7, 6), (4, 3)])
def test_the_first_layers_stay_where_late_ones_do_harm(first_bad: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, names = converted()
    states = spoiled(monkeypatch, names[first_bad:])
    record = refitted(original, model)
    assert record.kept and record["kl_after"] < record["kl_before"]
    assert (record["layers"], record["kept_layers"], list(record["steps"])) == (12, kept, names[:kept])
    assert same(model, states[names[kept - 1]])


def test_all_layers_stay_where_they_help_and_nothing_else_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, names = converted()
    states, calls, real = spoiled(monkeypatch, []), [], Guard.divergence
    monkeypatch.setattr(Guard, "divergence", lambda self, net: (calls.append(1), real(self, net))[1])
    record = refitted(original, model)
    assert record.kept and (record["kept_layers"], list(record["steps"]), len(calls)) == (12, names, 2)
    assert same(model, states[names[-1]])


def test_nothing_stays_where_the_first_layer_does_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    original, model, names = converted()
    before = copy.deepcopy(model.state_dict())
    spoiled(monkeypatch, names)
    record = refitted(original, model)
    assert not record.kept and record["kept_layers"] == 0 and record["layers"] == 12 and list(record["steps"]) == names
    assert record["kl_after"] > record["kl_before"] and same(model, before)


def test_an_exception_on_the_way_restores_the_network() -> None:
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    journal = Journal()

    def change() -> Partial:
        for _ in range(4):
            with journal.entry(model.parameters()), torch.no_grad():
                model.weight.mul_(2)
        return Partial(4, keep, lambda _: {})

    def keep(count: int) -> None:
        journal.keep(count)
        raise KeyboardInterrupt

    guard = Guard(Comparison(model, torch.ones(1, 2)), now=0.0)
    with pytest.raises(KeyboardInterrupt):
        guard.attempt(model, "one", change)
    assert same(model, before) and guard.current(model) == 0.0
