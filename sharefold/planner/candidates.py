"""What every group of a network may become: all methods' options with their costs and damages, and the knapsack."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from sharefold.calibration.calibrate import Calibration
from sharefold.calibration.problem import GroupProblem
from sharefold.calibration.ragged import RaggedProblem, can_share, problem_for
from sharefold.errors import SharefoldError
from sharefold.graph import Group, NetworkGraph, find_groups
from sharefold.layers import ConvForm, checked_form
from sharefold.methods import AUTO, Candidate, LayerMethod, method_named, step_named
from sharefold.options import PlanOptions
from sharefold.planner.costs import Cost, Parameters
from sharefold.planner.objectives import Objective, objective_named
from sharefold.plans import GroupPlan, Plan, Progress
from sharefold.solvers import allocate as knapsack
from sharefold.untrusted import exclude_pattern

# Methods' candidates for some layers: they do not depend on what is counted.
Known: TypeAlias = dict[tuple[str, tuple[str, ...]], list[Candidate]]

# So many mixtures of its members' own options compete with what a unit can share.
PRICES = 40
BEYOND = 2  # powers of ten
REASONS = 3  # so many reasons why layers cannot be shared does a refusal name


@dataclass(frozen=True)
class PricedPlans(knapsack.Option):
    """One way to treat a unit: its cost in what the budget counts, the expected damage, and its group plans (none = keep)."""

    plans: tuple[GroupPlan, ...] = ()


@dataclass(frozen=True)
class Candidates:
    """The options of all groups of a network; made once, they serve every budget that counts the same.

    Attributes:
        options: per group, "keep" first.
        cost: what is counted.
        fixed: of the dense network's cost, what no option touches.
        before: parameters of the whole dense network.
        method: what was allowed, for messages.
        members: per group the names of its layers.
        skipped: layers that cannot be shared, and why; for messages.
    """

    options: list[list[PricedPlans]]
    cost: Cost
    fixed: float
    before: int
    method: str
    members: list[tuple[str, ...]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """Least cost that the whole network can have."""
        return self.fixed + sum(min(option.cost for option in row) for row in self.options)

    def pick(self, limit: float, budget: str, factors: Sequence[float] | None = None) -> list[int]:
        """The option of every group, least total damage first, that cost at most ``limit`` with all that stays.

        Args:
            budget: what the user wrote, for the message.
            factors: per group, on its damages; by default ones.

        Raises:
            SharefoldError: below the floor, which it says.
        """
        if limit < self.floor:
            raise self.refusal(limit, budget, self.floor)
        weights = [1.0] * len(self.options) if factors is None else factors
        rows = [
            [knapsack.Option(option.cost, option.value * weight) for option in row]
            for row, weight in zip(self.options, weights, strict=True)
        ]
        return knapsack.allocate(rows, limit - self.fixed)

    def refusal(self, limit: float, budget: str, floor: float) -> SharefoldError:
        """What to say of a budget below ``floor``."""
        return SharefoldError(self.cost.below(limit, budget, floor, self.method) + left_out(self.skipped))

    def spent(self, picks: Sequence[int]) -> float:
        """Cost of the whole network with these options."""
        return self.fixed + sum(row[pick].cost for row, pick in zip(self.options, picks, strict=True))

    def damage(self, picks: Sequence[int]) -> float:
        """Expected damage of these options, summed."""
        return sum(row[pick].value for row, pick in zip(self.options, picks, strict=True))

    def alone(self) -> bool:
        """Whether every option can be tried by itself: no method reorders channels of the dense network first."""
        names = {plan.method for row in self.options for option in row for plan in option.plans}
        return not any(step_named(name).may_align() for name in names)

    def plan(self, picks: Sequence[int], budget: str) -> Plan:
        """The plan of these options; ``budget`` is what the user wrote."""
        chosen = [plan for row, pick in zip(self.options, picks, strict=True) for plan in row[pick].plans]
        saved = sum(g.params_before - g.params_after for g in chosen)
        source = f"budget {budget}, method {self.method}"
        if not isinstance(self.cost, Parameters):
            source += f": {self.cost.text(self.spent(picks))} of {self.cost.text(self.cost.total)} expected"
        return Plan(chosen, self.before, self.before - saved, source)


def find_candidates(
    cal: Calibration, options: PlanOptions | None = None, cost: Cost | None = None, progress: Progress | None = None
) -> Candidates:
    """Everything that the methods of ``options`` offer for the layers of the calibrated network that are not excluded.

    Args:
        cost: what budgets will count; by default parameters.
        progress: called with ("planning", done, total).

    Raises:
        SharefoldError: unknown method or objective, malformed expression.
    """
    options = PlanOptions() if options is None else options
    model, graph = cal.original, cal.graph
    allowed = (AUTO if options.method == "auto" else (options.method,)) if isinstance(options.method, str) else options.method
    methods = [method_named(name) if options.pivots else method_named(name).without_pivots() for name in allowed]
    units = find_units(graph, options.exclude)
    if any(method.takes_ragged for method in methods):
        units = together(model, units)
    cost = cost or Parameters(model, graph)
    weigh = objective_named(options.objective)(cal.statistics)
    found = unit_options(cal, units, methods, cost, weigh, progress)
    fixed = max(cost.total - sum(cost.dense(name) for unit in units for name in unit.members), 0)
    before = sum(p.numel() for p in model.parameters())
    used = {name for unit in units for name in unit.members}
    skipped = {**graph.skipped, **{name: "excluded" for name in graph.layers if name not in used}}
    return Candidates(found, cost, fixed, before, method_text(options.method), [unit.members for unit in units], skipped)


def left_out(skipped: Mapping[str, str]) -> str:
    """The end of a refusal: how many layers cannot be shared, and the commonest reasons; "" where all can."""
    reasons = Counter(skipped.values())
    parts = [f"{count} x {reason}" for reason, count in reasons.most_common(REASONS)]
    parts += ["others"] if len(reasons) > REASONS else []
    return f". {len(skipped)} layers stay as they are: {'; '.join(parts)}" if parts else ""


def method_text(method: str | Sequence[str]) -> str:
    """One or several methods as plans and messages name them."""
    return method if isinstance(method, str) else " + ".join(method)


def find_units(graph: NetworkGraph, exclude: str | None = None) -> list[Group]:
    """Every group of isomorphic layers, and every other convertible layer as a group of one."""
    pattern = exclude_pattern(exclude)
    wanted = [name for name in graph.layers if pattern is None or not pattern.search(name)]
    groups = [
        replace(group, members=tuple(m for m in group.members if m in set(wanted)))
        for group in find_groups(graph)
    ]
    groups = [group for group in groups if len(group.members) > 1]
    grouped = {name for group in groups for name in group.members}
    singles = [
        Group(name, r.stage, r.role, (name,), r.weight_shape, r.groups)
        for name, r in graph.layers.items()
        if name in wanted and name not in grouped
    ]
    order = {name: index for index, name in enumerate(graph.layers)}
    return sorted(groups + singles, key=lambda group: order[group.members[0]])


def together(model: nn.Module, units: Sequence[Group]) -> list[Group]:
    """``units``, with the single layers of a stage that one bank can serve, though they differ in width, in one unit."""
    sets: dict[tuple[object, ...], list[tuple[Group, ConvForm]]] = {}
    for unit in units:
        form = checked_form(unit.members[0], model.get_submodule(unit.members[0]))
        if len(unit.members) == 1 and unit.stage is not None:
            sets.setdefault((unit.stage, form.kind, form.stock_kernel_size, form.standardize), []).append((unit, form))
    result = list(units)
    for found in sets.values():
        singles, forms = zip(*found, strict=True)
        if len(found) > 1 and can_share(forms):
            size = "x".join(str(k) for k in forms[0].stock_kernel_size)
            kind = f"conv{'t' * forms[0].transposed}{size}" if forms[0].convolves else "linear"
            names = tuple(unit.members[0] for unit in singles)
            merged = replace(singles[0], name=f"stage{singles[0].stage}.{kind}-widths", members=names)
            result = [merged if unit is singles[0] else unit for unit in result if unit not in singles[1:]]
    return result


def unit_options(
    cal: Calibration, units: Sequence[Group], methods: Sequence[LayerMethod], cost: Cost, objective: Objective,
    progress: Progress | None = None,
) -> list[list[PricedPlans]]:  # fmt: skip
    """For every unit its undominated options, "keep" first; where several costs count, all that are offered in each direction of
    ``cost``. Statistics are gathered a bounded batch at a time."""
    result: list[list[PricedPlans]] = []
    for batch in cal.statistics.batches([unit.members for unit in units]):
        cal.statistics.moments([name for index in batch for name in units[index].members])
        for index in batch:
            problem = _weighed(cal, units[index].members, objective)
            known: Known = {}
            rows = [_Unit(units[index], problem, one, known).options(methods) for one in cost.directions]
            result.append([option for row in rows for option in row])
            if progress:
                progress("planning", len(result), len(units))
    return result


def _weighed(cal: Calibration, members: Sequence[str], objective: Objective) -> GroupProblem | RaggedProblem:
    """The tensors of a unit, with the objective's factors."""
    problem = problem_for(cal.original, cal.graph, members, cal.statistics)
    if isinstance(problem, GroupProblem):
        problem.importance = objective(problem, members)
        return problem
    for one, name in zip(problem.alone, members, strict=True):
        one.importance = objective(one, [name])
    return problem


class _Unit:
    """One group, its tensors and what its options cost."""

    def __init__(self, group: Group, problem: GroupProblem | RaggedProblem, cost: Cost, known: Known) -> None:
        self.group, self.problem, self.cost, self.known = group, problem, cost, known
        self.importance = problem.importance.cpu()

    def options(self, methods: Sequence[LayerMethod]) -> list[PricedPlans]:
        """Undominated ones, "keep" first; all of them where the cost does not settle which are."""
        worth = _undominated if self.cost.settles else list
        members = self.group.members
        dense = sum(self.cost.dense(name) for name in members)
        if isinstance(self.problem, RaggedProblem):
            methods = [method for method in methods if method.takes_ragged or method.smallest_group == 1]
        elif self.problem.frames is not None:
            methods = [method for method in methods if method.takes_frames]
        table = self._per_layer_table([m for m in methods if m.smallest_group == 1])
        options = [PricedPlans(dense, 0.0)]
        if len(table) == 1:
            return worth(options + table[0])
        shared = [(m, c) for m in methods if m.smallest_group > 1 for c in self._candidates(m)]
        # What every further member adds, and what each member suffers; the bank left out.
        added = [self.cost.member(members, self.problem.forms, m, c) for m, c in shared]
        values = [(c.errors * self.importance).tolist() for _, c in shared]
        mixed = [
            row + [PricedPlans(cost, each[k]) for cost, each in zip(added, values, strict=True)] for k, row in enumerate(table)
        ]
        prices = sorted({*prices_of(table), *prices_of(mixed, PRICES // 2)})
        columns = [_best_at(row, prices) for row in table]
        best = [list(picks) for picks in zip(*columns, strict=True)]
        options += [_together(picks) for picks in best]
        for (method, candidate), cost, each in zip(shared, added, values, strict=True):
            options.append(self._shared(method, candidate, list(range(len(table)))))
            for stay, alone in self._partings(cost, each, prices, best):
                if method.fits([self.problem.forms[k] for k in stay], candidate.options):
                    options.append(_together([self._shared(method, candidate, stay), *alone]))
        return worth(options)

    def _candidates(self, method: LayerMethod) -> list[Candidate]:
        """What ``method`` offers; found once."""
        key = method.name, self.group.members
        if key not in self.known:
            found = method.candidates(self.problem)  # type: ignore[arg-type]
            # They are compared number by number: on the CPU that makes no device wait.
            self.known[key] = [replace(candidate, errors=candidate.errors.cpu()) for candidate in found]
        return self.known[key]

    def _per_layer_table(self, methods: Sequence[LayerMethod]) -> list[list[PricedPlans]]:
        """For every member what it may become on its own, "keep" first."""
        alone = [self._alone(index) for index in range(len(self.group.members))]
        table = [[PricedPlans(one.cost.dense(name), 0.0)] for name, one in zip(self.group.members, alone, strict=True)]
        for method in methods:
            if isinstance(self.problem, RaggedProblem):
                offers = [one._candidates(method) for one in alone]
            else:
                offers = self._for_each(method)
            for one, row, found in zip(alone, table, offers, strict=True):
                row += [one._shared(method, candidate, [0]) for candidate in found]
        return table

    def _alone(self, index: int) -> _Unit:
        """One member as a unit."""
        name = self.group.members[index]
        return _Unit(replace(self.group, name=name, members=(name,)), self.problem.only(index), self.cost, self.known)

    def _for_each(self, method: LayerMethod) -> list[list[Candidate]]:
        """What a method that treats every layer on its own offers each member: solved for all of them at once, since many small
        problems one after another take a machine several times as long."""
        found, size = self._candidates(method), len(self.group.members)
        return [
            [replace(one, cost=one.cost / size, errors=one.errors[index : index + 1]) for one in found] for index in range(size)
        ]

    def _partings(
        self, added: float, values: list[float], prices: list[float], best: list[list[PricedPlans]]
    ) -> Iterator[tuple[list[int], list[PricedPlans]]]:
        """Which members stay in a group, and what the others become, when those leave that do better on their own at some price.

        The others' errors are those of sharing with everybody; solved again without the leavers they can only fall.

        Args:
            added: what every member costs in the group.
            values: (K,) what each suffers there.
        """
        size, seen = len(values), set()
        for price, alone in zip(prices, best, strict=True):
            stay = [k for k in range(size) if values[k] + price * added <= alone[k].value + price * alone[k].cost]
            others = [alone[k] for k in range(size) if k not in stay]
            key = (tuple(stay), tuple(map(id, others)))
            if 1 < len(stay) < size and key not in seen:
                seen.add(key)
                yield stay, others

    def _shared(self, method: LayerMethod, candidate: Candidate, stay: list[int]) -> PricedPlans:
        unit, problem = self.group, self.problem
        forms = [problem.forms[k] for k in stay]
        errors = candidate.errors[stay]
        group = GroupPlan(
            unit.name, method.name, tuple(unit.members[k] for k in stay), candidate.options,
            sum(form.out_channels * form.features for form in forms), method.cost(forms, candidate.options),
            float(errors.mean()), unit.stage, unit.role,
        )  # fmt: skip
        cost = self.cost.shared(unit.members, problem.forms, method, candidate, stay)
        return PricedPlans(cost, float((errors * self.importance[stay]).sum()), (group,))


def _best_at(row: Sequence[PricedPlans], prices: Sequence[float]) -> list[PricedPlans]:
    """The option of a row that is best at each price of a unit of cost."""
    values, costs = np.array([option.value for option in row]), np.array([option.cost for option in row])
    return [row[pick] for pick in (values + np.outer(prices, costs)).argmin(1)]


def prices_of(table: Sequence[Sequence[PricedPlans]], most: int = PRICES) -> list[float]:
    """Damages a unit of cost between which the best option of some row changes: at most so many, evenly spaced among them.

    So they have the scale of the unit's own damages and costs. Some more are spread from below the least to above the greatest:
    which members do better on their own than in a group changes between and beyond them too.
    """
    slopes: set[float] = set()
    for row in table:
        points = [option for option in _undominated(list(row)) if math.isfinite(option.value)]
        while len(points) > 1:
            # From the dearest option down to the one that costs least damage for what it saves: the lower convex hull.
            here, rest = points[0], points[1:]
            each = [(other.value - here.value) / (here.cost - other.cost) for other in rest]
            best = min(each)
            slopes.add(best)
            points = rest[max(index for index, slope in enumerate(each) if slope == best) :]
    found = sorted(slopes)
    # Just above a slope the step has been taken.
    between = [math.sqrt(low * high) if low > 0 else high / 2 for low, high in zip(found, found[1:], strict=False)]
    prices = [found[0] / 2, *between, 2 * found[-1]] if found else []
    index = torch.linspace(0, len(prices) - 1, min(most, len(prices))).round().long().tolist()
    positive = [price for price in prices if price > 0]
    spread: list[float] = []
    if positive:
        ends = math.log10(positive[0]) - BEYOND, math.log10(positive[-1]) + BEYOND
        spread = torch.logspace(*ends, most // 2, dtype=torch.float64).tolist()
    return sorted({*(prices[i] for i in index), *spread})


def _together(options: Sequence[PricedPlans]) -> PricedPlans:
    plans = tuple(plan for option in options for plan in option.plans)
    return PricedPlans(sum(o.cost for o in options), sum(o.value for o in options), plans)


def _undominated(options: list[PricedPlans]) -> list[PricedPlans]:
    """Options by falling cost, without those that another beats in cost and value; "keep" stays first."""
    best: list[PricedPlans] = []
    for option in sorted(options, key=lambda o: (o.cost, o.value)):
        if not best or option.value < best[-1].value:
            best.append(option)
    return best[::-1]
