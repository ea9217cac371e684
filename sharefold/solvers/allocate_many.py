"""Allocation under several budgets at once: one choice per group, least total loss, every unit within its bound.

The multiple-choice knapsack with a vector of costs. Each unit gets a price (a Lagrange multiplier). For given prices every group
takes its best option on its own; the dual, a concave function of the few prices, is maximised by the ellipsoid method with deep
cuts (Bland, Goldfarb and Todd, https://doi.org/10.1287/opre.29.6.1039). Picks met on the way, and the cheapest ones in every
unit, are repaired towards the budgets and filled up; the best of them is improved by exchanges in two groups at a time. A search
over partial choices, pruned by the dual bound, then proves it or finds the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sharefold.errors import SharefoldError
from sharefold.solvers.allocate import Option, allocate
from sharefold.solvers.undominated import dominated, undominated

# Partial choices that the search keeps, and times options of the next group.
STATE_LIMIT, EXPANSION_LIMIT = 10_000, 100_000
# In units of the losses' range: how exactly the dual is maximised. In the same for each budget: prices are not sought above.
PRECISION, LARGEST_PRICE = 1e-7, 1e6
STEPS = 300  # of the ellipsoid method, a unit
EXCHANGED, PAIRED = 3, 500  # picks that are improved by exchanges, and the options that are exchanged
STARTS = 6  # picks of the highest duals, and as many of the least losses, that are repaired and filled
# Of a budget: sums of floating-point numbers in another order.
ROUNDING = 1e-12


@dataclass(frozen=True)
class ManyOption:
    """One option of a group: ``costs``, one in each unit, and ``value``, the loss it causes (lower is better)."""

    costs: tuple[float, ...]
    value: float


def allocate_many(
    options: Sequence[Sequence[ManyOption]], budgets: Sequence[float], *, exact: bool = True
) -> list[int] | None:
    """Picks one option of every group so that the values add up to the least within every budget.

    With ``exact`` the answer is the best there is, unless more than ``STATE_LIMIT`` partial choices are open at a time. Otherwise
    it is that of prices, repair, fill and exchange, which for tens of groups loses a fraction of a per cent more. Picks within
    all budgets are found wherever there are any, as long as the search keeps within that limit; mostly the prices find them.

    Args:
        budgets: one in each unit.

    Returns:
        The index of the chosen option of every group; None where no picks within all budgets are found.

    Raises:
        SharefoldError: a group has no option, or a number is not finite.
    """
    for g, group in enumerate(options):
        if not group:
            raise SharefoldError(f"allocate: group {g} has no option: give every group at least one")
        if not all(np.isfinite((*c.costs, c.value)).all() for c in group):
            raise SharefoldError(f"allocate: group {g} has an option with a cost or value that is not finite")
    if len(budgets) == 1:
        if sum(min(option.costs[0] for option in group) for group in options) > budgets[0]:
            return None
        rows = [[Option(option.costs[0], option.value) for option in group] for group in options]
        return allocate(rows, budgets[0], exact=exact)
    problem = _Problem(options, budgets)
    if not options or (problem.room < -ROUNDING * np.abs(problem.budgets)).any():
        return None if (problem.room < 0).any() else []
    prices, starts, hopeless = _dual(problem)
    if hopeless:
        return None
    found = _polished(problem, prices, starts)
    if exact or found is None:
        found = _searched(problem, prices, found)
    return None if found is None else [int(kept[p]) for kept, p in zip(problem.index, found, strict=True)]


class _Problem:
    """The undominated options of every group as arrays.

    Attributes:
        index: per group, which of the given options its are.
        real: per group its costs as they were given, (K, U).
        room: (U,) what the cheapest options leave of the budgets.
        cost: (G, K, U) above the group's cheapest, in units of the room; 0 where a group has fewer options.
        value: (G, K) above the group's least, in units of the sum of the groups' ranges; infinite where it has fewer.
        limit: (U,) what ``cost`` may add up to.
    """

    def __init__(self, options: Sequence[Sequence[ManyOption]], budgets: Sequence[float]) -> None:
        self.budgets, units = np.array(budgets, float), len(budgets)
        self.index, self.real, values = [], [], []
        for group in options:
            costs = np.array([option.costs for option in group], float).reshape(len(group), units)
            value = np.array([option.value for option in group], float)
            kept = undominated(np.column_stack([costs, value]))
            self.index.append(kept)
            self.real.append(costs[kept])
            values.append(value[kept])
        self.least = [costs.min(0) for costs in self.real]
        self.room = self.budgets - sum(self.least, np.zeros(units))
        scale = np.where(self.room > 0, self.room, np.maximum(np.abs(self.budgets), 1e-300))
        self.limit = np.where(self.room > 0, 1.0, 0.0)
        most = max((len(kept) for kept in self.index), default=0)
        self.cost = np.zeros((len(options), most, units))
        self.value = np.full((len(options), most), np.inf)
        spread = sum(float(value.max() - value.min()) for value in values) or 1.0
        for g, (costs, value) in enumerate(zip(self.real, values, strict=True)):
            self.cost[g, : len(value)] = (costs - self.least[g]) / scale
            self.value[g, : len(value)] = (value - value.min()) / spread
        self.rows = np.arange(len(options))

    def at(self, prices: np.ndarray) -> np.ndarray:
        """The option of every group that is best at ``prices``."""
        return (self.value + self.cost @ prices).argmin(1)

    def spent(self, picks: np.ndarray) -> np.ndarray:
        return self.cost[self.rows, picks].sum(0)

    def loss(self, picks: np.ndarray) -> float:
        return float(self.value[self.rows, picks].sum())

    def fits(self, picks: Sequence[int] | np.ndarray) -> bool:
        """Whether the costs as they were given are within every budget, added up in order."""
        spent = sum((costs[p] for costs, p in zip(self.real, picks, strict=True)), np.zeros(len(self.budgets)))
        return bool((spent <= self.budgets).all())


def _dual(problem: _Problem) -> tuple[np.ndarray, list[np.ndarray], bool]:
    """The best prices, picks to start from, and whether the dual proves that none are within the budgets."""
    units = len(problem.budgets)
    centre, shape = np.ones(units), np.eye(units) * units * LARGEST_PRICE**2
    best, prices = -np.inf, centre
    met: dict[bytes, tuple[float, np.ndarray]] = {}  # picks, with the dual at which they were met
    for _ in range(STEPS * units):
        worst = int(centre.argmin())
        if centre[worst] < 0:
            slope, ahead = np.eye(units)[worst], -centre[worst]
        else:
            picks = problem.at(centre)
            slope = problem.spent(picks) - problem.limit
            dual = problem.loss(picks) + float(centre @ slope)
            met[picks.tobytes()] = dual, picks
            if dual > best:
                best, prices = dual, centre
            if best > 1 + ROUNDING:  # more than the greatest loss of all
                return prices, [], True
            ahead = best - dual
        reach = float(np.sqrt(max(slope @ shape @ slope, 0.0)))
        if reach <= PRECISION or ahead >= reach:
            break
        centre, shape = _cut(centre, shape, slope, reach, ahead / reach)
    by_dual = [picks for _, picks in sorted(met.values(), key=lambda pair: -pair[0])]
    by_loss = sorted((picks for picks in by_dual if problem.fits(picks)), key=problem.loss)
    weights = [*np.eye(units), np.ones(units), np.maximum(prices, 1e-30)]
    barred = np.where(np.isinf(problem.value), np.inf, 0.0)
    cheapest = [(problem.cost @ weight + barred).argmin(1) for weight in weights]
    return prices, [*by_loss[:STARTS], *by_dual[:STARTS], *cheapest], False


def _cut(
    centre: np.ndarray, shape: np.ndarray, slope: np.ndarray, reach: float, depth: float
) -> tuple[np.ndarray, np.ndarray]:
    """The smallest ellipsoid around the part of this one that lies where ``slope`` points, from ``depth`` (0 to 1 of its reach in
    that direction) on; of two dimensions or more."""
    n = len(centre)
    step = shape @ slope / reach
    shrink = 2 * (1 + n * depth) / ((n + 1) * (1 + depth))
    shape = n**2 / (n**2 - 1) * (1 - depth**2) * (shape - shrink * np.outer(step, step))
    return centre + (1 + n * depth) / (n + 1) * step, (shape + shape.T) / 2


def _polished(problem: _Problem, prices: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray | None:
    """The best that repair, fill and exchange make of ``starts``; None where nothing is within the budgets."""
    repaired = [_repaired(problem, start) for start in starts]
    filled = {picks.tobytes(): picks for picks in (_filled(problem, picks) for picks in repaired if problem.fits(picks))}
    best = sorted(filled.values(), key=problem.loss)[:EXCHANGED]
    return min((_exchanged(problem, prices, picks) for picks in best), key=problem.loss, default=None)


def _repaired(problem: _Problem, picks: np.ndarray) -> np.ndarray:
    """Picks nearer to the budgets: the change that costs least for what it takes off the excess, until none takes any."""
    picks, cost, value = picks.copy(), problem.cost, problem.value
    for _ in range(10 * len(picks)):
        spent = problem.spent(picks)
        excess = np.maximum(spent - problem.limit, 0).sum()
        if excess <= 0:
            break
        changed = spent - cost[problem.rows, picks][:, None] + cost
        gained = excess - np.maximum(changed - problem.limit, 0).sum(2)
        lost = value - value[problem.rows, picks][:, None]
        price = np.where((gained > ROUNDING) & np.isfinite(lost), lost / np.maximum(gained, ROUNDING), np.inf)
        g, k = np.unravel_index(int(price.argmin()), price.shape)
        if not np.isfinite(price[g, k]):
            break
        picks[g] = k
    return picks


def _filled(problem: _Problem, picks: np.ndarray) -> np.ndarray:
    """Spends what is left: the single change with the largest gain that still fits, until none does."""
    picks, cost, value = picks.copy(), problem.cost, problem.value
    barred = np.zeros(value.shape, bool)
    while True:
        changed = problem.spent(picks) - cost[problem.rows, picks][:, None] + cost
        gain = value[problem.rows, picks][:, None] - value
        gain = np.where((changed <= problem.limit + ROUNDING).all(2) & ~barred, gain, -np.inf)
        g, k = np.unravel_index(int(gain.argmax()), gain.shape)
        if not gain[g, k] > 0:
            return picks
        before, picks[g] = picks[g], k
        if not problem.fits(picks):
            picks[g], barred[g, k] = before, True


def _exchanged(problem: _Problem, prices: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Changes two groups at a time, the pair with the largest gain first, until none gains that fits."""
    reduced = problem.value + problem.cost @ prices
    beyond = reduced - reduced.min(1, keepdims=True)
    near = np.argsort(beyond, axis=None, kind="stable")[:PAIRED]
    groups, options = np.unravel_index(near[np.isfinite(beyond.flat[near])], beyond.shape)
    apart = groups[:, None] != groups
    while True:
        gain = problem.value[groups, picks[groups]] - problem.value[groups, options]
        more = problem.cost[groups, options] - problem.cost[groups, picks[groups]]
        left = problem.limit - problem.spent(picks)
        total = np.where(apart, gain[:, None] + gain, -np.inf)
        for unit, room in zip(more.T, left, strict=True):
            total[unit[:, None] + unit > room] = -np.inf
        i, j = np.unravel_index(int(total.argmax()), total.shape)
        changed = picks.copy()
        changed[groups[[i, j]]] = options[[i, j]]
        if not total[i, j] > ROUNDING or not problem.fits(changed):
            return picks
        picks = changed


def _searched(problem: _Problem, prices: np.ndarray, found: np.ndarray | None) -> np.ndarray | None:
    """Better picks than ``found`` by adding one group at a time to partial choices, or ``found``.

    Options that no better picks can hold, by the dual bound, are left out. A partial choice is dropped when the rest's cheapest
    options do not fit beside it, when its loss plus the bound of the rest cannot beat ``found``, and when another one costs and
    loses no more. Where they become too many the search ends with ``found``; without it, the most promising ones stay.
    """
    count, units = len(problem.real), len(problem.budgets)
    floors = np.cumsum([np.zeros(units), *problem.least[::-1]], axis=0)[::-1]
    reduced = problem.value + problem.cost @ prices
    bounds = np.concatenate([np.cumsum(reduced.min(1)[::-1])[::-1], [0.0]]) - float(prices @ problem.limit)
    known = np.inf if found is None else problem.loss(found)
    room = problem.budgets + ROUNDING * np.abs(problem.budgets)
    options = [np.flatnonzero(row - row.min() + bounds[0] < known) for row in reduced]
    cost, value, score = np.zeros((1, units)), np.zeros(1), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    for g, left in enumerate(options):
        next_cost = (cost[:, None] + problem.real[g][left]).reshape(-1, units)
        next_value = (value[:, None] + problem.value[g, left]).ravel()
        next_score = (score[:, None] + reduced[g, left]).ravel()
        promising = next_score + bounds[g + 1] < known
        alive = np.flatnonzero((next_cost + floors[g + 1] <= room).all(1) & promising)
        if len(alive) > EXPANSION_LIMIT and found is not None:
            return found
        alive = alive[~dominated(np.column_stack([next_cost, next_value])[alive])]
        most = STATE_LIMIT if g + 1 == count else min(STATE_LIMIT, EXPANSION_LIMIT // max(len(options[g + 1]), 1))
        if len(alive) > most:
            if found is not None:
                return found
            alive = alive[np.argsort(next_score[alive], kind="stable")[:most]]
        if len(alive) == 0:
            return found
        cost, value, score = next_cost[alive], next_value[alive], next_score[alive]
        history.append((alive // len(left), left[alive % len(left)]))
    for state in np.argsort(value, kind="stable"):
        picks = np.zeros(count, int)
        for g in range(count - 1, -1, -1):
            parents, chosen = history[g]
            picks[g], state = chosen[state], parents[state]
        if problem.fits(picks):
            return picks if problem.loss(picks) < known else found
    return found
