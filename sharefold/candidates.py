"""What every group of a network may become: all methods' options with their costs and damages, and the knapsack."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sharefold.calibrate.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import Group, NetworkGraph, find_groups
from sharefold.methods import AUTO, Choice, Method, method_named
from sharefold.methods.problem import GroupProblem, problem_of
from sharefold.plans import GroupPlan, Plan, Progress
from sharefold.solvers.allocate import Choice as Item
from sharefold.solvers.allocate import allocate


@dataclass(frozen=True)
class Option:
    """One way to treat a unit: its group plans (none = keep), cost in parameters, and expected damage."""

    plans: tuple[GroupPlan, ...]
    cost: float
    value: float


@dataclass(frozen=True)
class Candidates:
    """The options of all groups of a network; made once, they serve every budget.

    Attributes:
        options: per group, "keep" first.
        before: parameters of the whole dense network.
        fixed: those of them that no option touches.
        method: what was allowed, for messages.
    """

    options: list[list[Option]]
    before: int
    fixed: int
    method: str

    @property
    def floor(self) -> int:
        """Fewest parameters that the whole network can have."""
        return self.fixed + sum(int(min(option.cost for option in row)) for row in self.options)

    def pick(self, limit: int, budget: str) -> Plan:
        """The plan of least total damage with at most ``limit`` parameters; ``budget`` is what the user wrote.

        Raises:
            SharefoldError: below the floor, which it says.
        """
        if limit < self.floor:
            raise SharefoldError(
                f"budget {budget} ({limit:,} parameters) is below what {self.method} can reach on this model: "
                f"the floor is {self.floor:,} parameters ({self.floor / self.before:.1%}); raise the budget or allow "
                "more methods"
            )
        rows = [[Item(option.cost, option.value) for option in row] for row in self.options]
        picks = allocate(rows, limit - self.fixed)
        chosen = [plan for row, pick in zip(self.options, picks, strict=True) for plan in row[pick].plans]
        saved = sum(g.params_before - g.params_after for g in chosen)
        return Plan(chosen, self.before, self.before - saved, f"budget {budget}, method {self.method}")


def find_candidates(
    model: nn.Module, graph: NetworkGraph, statistics: Statistics, method: str | Sequence[str] = "auto",
    exclude: str | None = None, progress: Progress | None = None,
) -> Candidates:  # fmt: skip
    """Everything that ``method`` offers for the layers of ``model`` that ``exclude`` does not match.

    Args:
        model: the dense network of ``graph`` and ``statistics``.
        method: ``"auto"``, a method's name, or several.
        exclude: regular expression over layer names.
        progress: called with ("planning", done, total).

    Raises:
        SharefoldError: unknown method, malformed expression.
    """
    allowed = (AUTO if method == "auto" else (method,)) if isinstance(method, str) else method
    methods = [method_named(name) for name in allowed]
    units = find_units(graph, exclude)
    options = unit_options(model, graph, statistics, units, methods, progress)
    before = sum(p.numel() for p in model.parameters())
    dense = sum(_weights(graph, name) for unit in units for name in unit.members)
    return Candidates(options, before, before - dense, method if isinstance(method, str) else " + ".join(method))


def find_units(graph: NetworkGraph, exclude: str | None = None) -> list[Group]:
    """Every group of isomorphic layers, and every other convertible layer as a group of one."""
    pattern = _compiled(exclude)
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


def unit_options(
    model: nn.Module, graph: NetworkGraph, statistics: Statistics, units: Sequence[Group], methods: Sequence[Method],
    progress: Progress | None = None,
) -> list[list[Option]]:  # fmt: skip
    """For every unit its undominated options, "keep" first; statistics are gathered a bounded batch at a time."""
    result: list[list[Option]] = []
    sensitivity = statistics.sensitivity()
    for batch in statistics.batches([unit.members for unit in units]):
        moments = statistics.moments([name for index in batch for name in units[index].members])
        for index in batch:
            problem = problem_of(model, graph, units[index].members, moments)
            problem.importance = importance(problem, [sensitivity.get(name) for name in units[index].members])
            result.append(_options(units[index], problem, methods))
            if progress:
                progress("planning", len(result), len(units))
    return result


def importance(problem: GroupProblem, sensitivity: Sequence[Tensor | None]) -> Tensor:
    """(K,) factor on each layer's relative error: the square root of the KL that losing the whole output would cost.

    The second-order estimate itself ranks layers well while errors are small and far too sharply when they are large;
    its square root lies half way, in the logarithm, between it and equal weights.
    """
    if any(s is None for s in sensitivity):
        return torch.ones_like(problem.importance)
    rows = torch.stack([s for s in sensitivity if s is not None]).to(problem.weights)
    damage = replace(problem, row_weights=rows).energy / 2
    return damage.clamp_min(1e-12).sqrt()


def _options(unit: Group, problem: GroupProblem, methods: Sequence[Method]) -> list[Option]:
    dense = problem.weights.numel()
    table = _per_layer_table(unit, problem, [m for m in methods if m.smallest_group == 1])
    options = [Option((), dense, 0.0)]
    if len(table) == 1:
        return _undominated(options + table[0])
    prices = [price / dense for price in torch.logspace(-2, 3, 40).tolist()]
    best = [[min(row, key=lambda o: o.value + price * o.cost) for row in table] for price in prices]
    options += [_together(picks) for picks in best]
    for method in methods:
        if method.smallest_group > 1:
            for choice in method.choices(problem):
                options.append(_shared(unit, problem, method, choice, list(range(len(table)))))
                options += _partly_shared(unit, problem, method, choice, prices, best)
    return _undominated(options)


def _per_layer_table(unit: Group, problem: GroupProblem, methods: Sequence[Method]) -> list[list[Option]]:
    """For every member what it may become on its own, "keep" first."""
    table = []
    for index, name in enumerate(unit.members):
        part = problem.only(index)
        one = replace(unit, name=name, members=(name,))
        row = [Option((), part.weights.numel(), 0.0)]
        for method in methods:
            row += [_shared(one, part, method, choice, [0]) for choice in method.choices(part)]
        table.append(row)
    return table


def _partly_shared(
    unit: Group, problem: GroupProblem, method: Method, choice: Choice, prices: list[float], best: list[list[Option]]
) -> list[Option]:  # fmt: skip
    """``choice`` without the members that do better on their own at some price of a parameter.

    The others' errors are those of sharing with everybody; solved again without the leavers they can only fall.
    """
    size = len(unit.members)
    own = (choice.cost - method.cost(problem.forms[:1], choice.options)) / max(size - 1, 1)
    values = (choice.errors * problem.importance).tolist()
    seen, options = set(), []
    for price, alone in zip(prices, best, strict=True):
        stay = [k for k in range(size) if values[k] + price * own <= alone[k].value + price * alone[k].cost]
        key = (tuple(stay), tuple(id(alone[k]) for k in range(size) if k not in stay))
        if 1 < len(stay) < size and key not in seen and method.fits([problem.forms[k] for k in stay], choice.options):
            seen.add(key)
            kept = _shared(unit, problem, method, choice, stay)
            options.append(_together([kept, *(alone[k] for k in range(size) if k not in stay)]))
    return options


def _shared(unit: Group, problem: GroupProblem, method: Method, choice: Choice, stay: list[int]) -> Option:
    forms = [problem.forms[k] for k in stay]
    cost = choice.cost if len(stay) == len(unit.members) else method.cost(forms, choice.options)
    errors = choice.errors[stay]
    group = GroupPlan(
        unit.name, method.name, tuple(unit.members[k] for k in stay), choice.options,
        sum(form.out_channels * form.features for form in forms), method.cost(forms, choice.options),
        float(errors.mean()), unit.stage, unit.role,
    )  # fmt: skip
    return Option((group,), cost, float((errors * problem.importance[stay]).sum()))


def _together(options: Sequence[Option]) -> Option:
    plans = tuple(plan for option in options for plan in option.plans)
    return Option(plans, sum(o.cost for o in options), sum(o.value for o in options))


def _undominated(options: list[Option]) -> list[Option]:
    """Options by falling cost, without those that another beats in cost and value; "keep" stays first."""
    best: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.value)):
        if not best or option.value < best[-1].value:
            best.append(option)
    return best[::-1]


def _weights(graph: NetworkGraph, name: str) -> int:
    o, i, h, w = graph.layers[name].weight_shape
    return o * i * h * w


def _compiled(exclude: str | None) -> re.Pattern[str] | None:
    try:
        return None if not exclude else re.compile(exclude)
    except re.error as error:
        raise SharefoldError(f"--exclude {exclude!r} is not a regular expression: {error}") from None
