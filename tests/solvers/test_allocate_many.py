"""One choice a group within several budgets at once: brute force, integer programming, and what cannot be met."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from sharefold.errors import SharefoldError
from sharefold.solvers import allocate_many as module
from sharefold.solvers.allocate import Option, allocate
from sharefold.solvers.allocate_many import ManyOption, allocate_many
from sharefold.solvers.undominated import dominated, undominated

Groups = list[list[ManyOption]]


def spent(groups: Groups, picks: Sequence[int]) -> list[float]:
    return [sum(costs) for costs in zip(*(group[p].costs for group, p in zip(groups, picks, strict=True)), strict=True)]


def loss(groups: Groups, picks: Sequence[int]) -> float:
    return sum(group[p].value for group, p in zip(groups, picks, strict=True))


def within(groups: Groups, picks: Sequence[int], budgets: Sequence[float]) -> bool:
    return all(cost <= budget for cost, budget in zip(spent(groups, picks), budgets, strict=True))


def brute_force(groups: Groups, budgets: Sequence[float]) -> float | None:
    every = itertools.product(*(range(len(group)) for group in groups))
    return min((loss(groups, picks) for picks in every if within(groups, picks, budgets)), default=None)


def bounds_of(groups: Groups, shares: Sequence[float]) -> list[float]:
    """Budgets between the sums of the least and of the largest costs."""
    ends = [[(min(c), max(c)) for c in zip(*(option.costs for option in group), strict=True)] for group in groups]
    sums = [(sum(low for low, _ in unit), sum(high for _, high in unit)) for unit in zip(*ends, strict=True)]
    return [low + share * (high - low) for (low, high), share in zip(sums, shares, strict=True)]


@st.composite
def instances(draw: st.DrawFn) -> tuple[Groups, list[float]]:
    units = draw(st.integers(2, 4))
    option = st.builds(ManyOption, st.tuples(*[st.integers(0, 30)] * units), st.integers(0, 50))
    groups = draw(st.lists(st.lists(option, min_size=1, max_size=5), min_size=1, max_size=5))
    return groups, bounds_of(groups, draw(st.lists(st.floats(0, 1), min_size=units, max_size=units)))


@settings(max_examples=150, deadline=None)
@given(instance=instances())
def test_every_pick_is_tried_by_brute_force_and_none_is_better(instance: tuple[Groups, list[float]]) -> None:
    groups, budgets = instance
    best = brute_force(groups, budgets)
    for exact in (True, False):
        picks = allocate_many(groups, budgets, exact=exact)
        assert (picks is None) == (best is None)
        if picks is not None and best is not None:
            assert within(groups, picks, budgets)
            assert loss(groups, picks) == best if exact else best <= loss(groups, picks)


def layers(rng: random.Random, groups: int, units: int) -> Groups:
    """Options as layers have them: parameters, multiplications, time; some save one of them alone."""
    found = []
    for _ in range(groups):
        size, area, weight = (float(np.exp(rng.uniform(*ends))) for ends in ((0, 5), (0, 4), (-3, 2)))
        row = [ManyOption((size, size * area, size**0.5)[:units], 0.0)]
        for _ in range(3):
            runs = rng.uniform(0.3, 1.0)
            for rank in range(1, 30):
                share = rank / 30 * rng.uniform(0.8, 1.2)
                costs = size * share, size * area * (runs + share * (1 - runs)), size**0.5 * (0.5 + share / 2)
                row.append(ManyOption(costs[:units], weight * (1 - min(share, 1.0)) ** 2 * rng.uniform(0.5, 1.5) + 1e-9))
        found.append(row)
    return found


def by_integer_programming(groups: Groups, budgets: Sequence[float]) -> float:
    options = [option for group in groups for option in group]
    one = np.zeros((len(groups), len(options)))
    one[np.repeat(np.arange(len(groups)), [len(group) for group in groups]), np.arange(len(options))] = 1
    costs = np.array([option.costs for option in options]).T
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(costs, -np.inf, budgets)]
    values = [option.value for option in options]
    return float(milp(values, constraints=limits, integrality=1, bounds=Bounds(0, 1), options={"mip_rel_gap": 1e-5}).fun)


@pytest.mark.parametrize(("count", "units", "seed"), [(8, 2, 0), (8, 3, 1), (20, 2, 2), (20, 3, 3), (60, 2, 4)])
def test_many_groups_come_within_half_a_per_cent_of_the_optimum(count: int, units: int, seed: int) -> None:
    rng = random.Random(seed)
    groups = layers(rng, count, units)
    budgets = bounds_of(groups, [rng.uniform(0.2, 0.5) for _ in range(units)])
    best = by_integer_programming(groups, budgets)
    for exact in (True, False):
        picks = allocate_many(groups, budgets, exact=exact)
        assert picks is not None and within(groups, picks, budgets)
        assert loss(groups, picks) <= 1.005 * best


def test_what_only_one_pick_meets_is_found() -> None:
    """Every group can be cheap in one unit only; the budgets leave one way to mix them."""
    rng = random.Random(0)
    for _ in range(20):
        groups = [[ManyOption((a, 20 - a), rng.randint(0, 9)) for a in rng.sample(range(21), 4)] for _ in range(6)]
        wanted = [rng.randrange(4) for _ in groups]
        picks = allocate_many(groups, spent(groups, wanted))
        assert picks is not None and spent(groups, picks) == spent(groups, wanted)
        assert loss(groups, picks) == brute_force(groups, spent(groups, wanted))
        assert allocate_many(groups, [cost - 0.5 for cost in spent(groups, wanted)]) is None


def test_too_many_partial_choices_end_the_search_not_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = layers(random.Random(5), 20, 2)
    budgets = bounds_of(groups, [0.3, 0.3])
    quick, searched = (allocate_many(groups, budgets, exact=exact) for exact in (False, True))
    assert quick is not None and searched is not None and loss(groups, searched) <= loss(groups, quick)
    monkeypatch.setattr(module, "STATE_LIMIT", 3)
    assert allocate_many(groups, budgets) == quick
    monkeypatch.setattr(module, "_polished", lambda *_: None)  # nothing found before: the most promising stay
    monkeypatch.setattr(module, "STATE_LIMIT", 100)
    found = allocate_many(groups, budgets)
    assert found is not None and within(groups, found, budgets)


def test_one_budget_is_the_other_solvers() -> None:
    rng = random.Random(2)
    rows = [[Option(rng.randint(0, 30), rng.randint(0, 50)) for _ in range(6)] for _ in range(6)]
    groups = [[ManyOption((option.cost,), option.value) for option in row] for row in rows]
    budget = sum(min(option.cost for option in row) for row in rows) + 20
    assert allocate_many(groups, [budget]) == allocate(rows, budget)
    assert allocate_many(groups, [0]) is None


def test_ends() -> None:
    assert allocate_many([], [0, 0]) == [] and allocate_many([], [1, -1]) is None
    assert allocate_many([[ManyOption((1, 9), 3), ManyOption((5, 2), 1)]], [100, 100]) == [1]
    assert allocate_many([[ManyOption((1, 9), 3), ManyOption((5, 2), 1)]], [1, 9]) == [0]
    assert allocate_many([[ManyOption((1, 9), 3), ManyOption((5, 2), 1)]], [4, 8]) is None
    with pytest.raises(SharefoldError, match="no option"):
        allocate_many([[]], [10, 10])
    with pytest.raises(SharefoldError, match="finite"):
        allocate_many([[ManyOption((1, float("nan")), 0)]], [10, 10])


def test_points_that_others_beat() -> None:
    rng = np.random.default_rng(0)
    points = rng.integers(0, 8, (200, 3)).astype(float)
    kept = undominated(points)
    for index, point in enumerate(points):
        better = [other for other in kept if other != index and (points[other] <= point).all()]
        assert bool(better) != (index in kept)
    many = rng.random((4000, 3))
    marked = dominated(many)
    kept = undominated(many)
    assert not marked[kept].any() and marked.sum() > 0.8 * (len(many) - len(kept))
    twice = np.concatenate([many, many])
    left = twice[~dominated(twice)]
    assert all((left <= twice[index]).all(1).any() for index in range(0, len(twice), 97))
