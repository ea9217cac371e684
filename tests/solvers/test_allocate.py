from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.solvers.allocate import Option, allocate


def brute_force(options: list[list[Option]], budget: float) -> float:
    return min(
        sum(c.value for c in picks) for picks in itertools.product(*options) if sum(c.cost for c in picks) <= budget
    )


choices = st.builds(Option, st.integers(0, 30), st.integers(0, 50))


@settings(max_examples=150, deadline=None)
@given(options=st.lists(st.lists(choices, min_size=1, max_size=5), min_size=1, max_size=5), share=st.floats(0, 1))
def test_exact_equals_brute_force(options: list[list[Option]], share: float) -> None:
    low = sum(min(c.cost for c in group) for group in options)
    high = sum(max(c.cost for c in group) for group in options)
    budget = low + share * (high - low)
    picks = allocate(options, budget)
    assert sum(g[p].cost for g, p in zip(options, picks, strict=True)) <= budget
    assert sum(g[p].value for g, p in zip(options, picks, strict=True)) == brute_force(options, budget)


def test_heuristic_is_feasible_and_close() -> None:
    rng = random.Random(0)
    ratios = []
    for _ in range(30):
        options = [
            [Option(r * size, weight * 0.8**r) for r in range(1, 20)]
            for size, weight in ((rng.uniform(1, 50), rng.uniform(0.1, 2)) for _ in range(12))
        ]
        budget = 0.4 * sum(g[-1].cost for g in options)
        losses = []
        for exact in (False, True):
            picks = allocate(options, budget, exact=exact)
            assert sum(g[p].cost for g, p in zip(options, picks, strict=True)) <= budget
            losses.append(sum(g[p].value for g, p in zip(options, picks, strict=True)))
        assert losses[1] <= losses[0]
        ratios.append(losses[0] / losses[1])
    assert sum(ratios) / len(ratios) < 1.02


def test_large_instances_finish() -> None:
    rng = random.Random(1)
    options = [[Option(rng.uniform(1, 1e6), rng.random()) for _ in range(40)] for _ in range(60)]
    picks = allocate(options, 60 * 2e5)
    assert sum(g[p].cost for g, p in zip(options, picks, strict=True)) <= 60 * 2e5


def test_a_budget_for_everything_takes_the_best_of_each() -> None:
    options = [[Option(1, 3), Option(5, 1)], [Option(2, 2), Option(9, 0)]]
    assert allocate(options, 100) == [1, 1]
    assert allocate([], 0) == []


def test_infeasible_budget_names_the_floor() -> None:
    with pytest.raises(SharefoldError, match="1,500"):
        allocate([[Option(1000, 0)], [Option(500, 0), Option(900, 0)]], 1499)
    with pytest.raises(SharefoldError, match="no option"):
        allocate([[]], 10)
    with pytest.raises(SharefoldError, match="finite"):
        allocate([[Option(1, float("nan"))]], 10)
