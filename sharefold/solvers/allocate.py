"""Budget allocation: one choice per group, least total loss within a budget (multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharefold.errors import SharefoldError

STATE_LIMIT = 200_000


@dataclass(frozen=True)
class Option:
    """One option of a group: ``cost`` (parameters, bytes, MACs) and ``value``, the loss it causes (lower is better)."""

    cost: float
    value: float


def _frontier(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no cheaper or equal option beats, by rising cost."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].cost, options[i].value)):
        if not kept or options[index].value < options[kept[-1]].value:
            kept.append(index)
    return kept


class _Groups:
    """The non-dominated options of every group as arrays."""

    def __init__(self, options: Sequence[Sequence[Option]]) -> None:
        self.index = [_frontier(group) for group in options]
        self.cost = [np.array([g[i].cost for i in kept], float) for g, kept in zip(options, self.index, strict=True)]
        self.value = [np.array([g[i].value for i in kept], float) for g, kept in zip(options, self.index, strict=True)]

    def at(self, multiplier: float) -> list[int]:
        """The option of every group that minimises value + multiplier * cost."""
        return [int(np.argmin(v + multiplier * c)) for c, v in zip(self.cost, self.value, strict=True)]

    def spent(self, picks: Sequence[int]) -> float:
        return float(sum(c[p] for c, p in zip(self.cost, picks, strict=True)))

    def loss(self, picks: Sequence[int]) -> float:
        return float(sum(v[p] for v, p in zip(self.value, picks, strict=True)))


def _bisect(groups: _Groups, budget: float) -> tuple[list[int], float]:
    """Feasible picks from the Lagrangian and the multiplier they were found at."""
    cheapest = [0] * len(groups.cost)
    free = groups.at(0.0)
    if groups.spent(free) <= budget:
        return free, 0.0
    low, high = 0.0, 1.0
    for _ in range(200):
        if groups.spent(groups.at(high)) <= budget:
            break
        low, high = high, high * 8
    else:
        return cheapest, high
    for _ in range(100):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if groups.spent(groups.at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return groups.at(high), high


def _fill(groups: _Groups, picks: list[int], budget: float) -> list[int]:
    """Spend what is left: the single change with the largest gain that still fits, until none does."""
    picks = list(picks)
    while True:
        room = budget - groups.spent(picks)
        best, change = 0.0, None
        for g, (cost, value) in enumerate(zip(groups.cost, groups.value, strict=True)):
            gain = np.where(cost - cost[picks[g]] <= room, value[picks[g]] - value, -np.inf)
            option = int(np.argmax(gain))
            if gain[option] > best:
                best, change = float(gain[option]), (g, option)
        if change is None:
            return picks
        picks[change[0]] = change[1]


def _exact(groups: _Groups, budget: float, picks: list[int], multiplier: float) -> list[int] | None:
    """Optimal picks by merging groups one at a time, or None when the states outgrow memory.

    A partial choice is dropped when another costs no more and loses no more, or when its loss plus the Lagrangian
    bound of the remaining groups cannot beat the best complete choice known.
    """
    count = len(groups.cost)
    floors = np.cumsum([float(c[0]) for c in groups.cost][::-1])[::-1]
    bounds = np.cumsum(
        [float((v + multiplier * c).min()) for c, v in zip(groups.cost, groups.value, strict=True)][::-1]
    )[::-1]
    incumbent = groups.loss(picks)
    cost, value = np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for g in range(count):
        if cost.size * groups.cost[g].size > 20 * STATE_LIMIT:
            return None
        next_cost = (cost[:, None] + groups.cost[g]).ravel()
        next_value = (value[:, None] + groups.value[g]).ravel()
        rest_floor, rest_bound = (floors[g + 1], bounds[g + 1]) if g + 1 < count else (0.0, 0.0)
        lower = next_value + rest_bound - multiplier * (budget - next_cost)
        slack = 1e-12 * (1 + abs(incumbent))
        alive = np.flatnonzero((next_cost + rest_floor <= budget) & (lower <= incumbent + slack))
        order = alive[np.lexsort((next_value[alive], next_cost[alive]))]
        best = np.minimum.accumulate(next_value[order])
        order = order[np.concatenate(([True], best[1:] < best[:-1]))] if order.size else order
        if order.size == 0:
            return picks
        if order.size > STATE_LIMIT:
            return None
        cost, value = next_cost[order], next_value[order]
        history.append((order // groups.cost[g].size, order % groups.cost[g].size))
    state = int(np.argmin(value))
    if value[state] >= incumbent:
        return picks
    result = [0] * count
    for g in range(count - 1, -1, -1):
        parents, chosen = history[g]
        result[g] = int(chosen[state])
        state = int(parents[state])
    return result


def allocate(options: Sequence[Sequence[Option]], budget: float, *, exact: bool = True) -> list[int]:
    """Pick one option of every group so that the values add up to the least within the budget.

    A Lagrangian bisection with a greedy fill gives a good answer; with ``exact`` a pruned search over cost-loss
    states then proves or improves it, unless the search outgrows its memory limit.

    Returns:
        The index of the chosen option of every group.

    Raises:
        SharefoldError: a group has no option, a number is not finite, or even the cheapest options exceed the
            budget; the message names the floor.
    """
    for g, group in enumerate(options):
        if not group:
            raise SharefoldError(f"allocate: group {g} has no option: give every group at least one")
        if not all(np.isfinite(c.cost) and np.isfinite(c.value) for c in group):
            raise SharefoldError(f"allocate: group {g} has an option with a cost or value that is not finite")
    if not options:
        return []
    groups = _Groups(options)
    cheapest = groups.spent([0] * len(groups.cost))
    if cheapest > budget:
        raise SharefoldError(
            f"budget: {budget:,.0f} is below the smallest possible {cheapest:,.0f}: raise it to at least that"
        )
    picks, multiplier = _bisect(groups, budget)
    picks = min((_fill(groups, start, budget) for start in (picks, [0] * len(groups.cost))), key=groups.loss)
    if exact:
        picks = _exact(groups, budget, picks, multiplier) or picks
    return [groups.index[g][p] for g, p in enumerate(picks)]
