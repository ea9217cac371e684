"""How many channels every hidden space keeps: least damage for what the whole network may cost.

A channel saves a row of every layer that carries it and the columns of those that read it. Rows of one space cross the columns of
another where a layer writes the one and reads the other, so that costs are products of widths: for a price per unit of cost every
space in turn takes its best width given the others', until nothing changes; the price is found by bisection, and what is left of
the budget goes back to where it helps most.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration
from sharefold.calibration.problem import problem_of
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.hidden_channels import HiddenSpace
from sharefold.methods import FOLD
from sharefold.methods.fold import elimination_of, options_for, readers_of, shares_of
from sharefold.options import PlanOptions
from sharefold.planner.costs import Cost, Parameters
from sharefold.planner.fold_probe import FoldProbe
from sharefold.planner.objectives import Objective, objective_named
from sharefold.plans import GroupPlan, Plan, Progress
from sharefold.solvers.channel_elimination import Elimination

SWEEPS, BISECTIONS = 8, 60


@dataclass(frozen=True)
class _Item:
    """Part of the cost that is proportional to the width of the space it is written in, or read from, or both (or -1)."""

    amount: float  # of the dense network
    written: int
    read: int


class FoldLevels:
    """The hidden spaces of a network, what their channels cost, and what is lost without them.

    Args:
        cal: of the dense network.
        spaces: from :func:`sharefold.graph.hidden_channels.hidden_spaces`.
        cost: what budgets count.
        options: ``objective`` says what damage is; unless it is "error", widths are chosen by what folding each space alone does
            to the network's output (:class:`FoldProbe`). Kept numbers of channels are multiples of ``round_channels``, or all.
    """

    def __init__(
        self, cal: Calibration, spaces: Sequence[HiddenSpace], cost: Cost, options: PlanOptions | None = None,
        progress: Progress | None = None,
    ) -> None:  # fmt: skip
        options = PlanOptions() if options is None else options
        objective = objective_named(options.objective)(cal.statistics)
        probe = FoldProbe(cal) if cal.comparable and options.objective != "error" else None
        model, graph, statistics = cal.original, cal.graph, cal.statistics
        self.spaces, self.cost = list(spaces), cost
        self.items = _items(model, graph, self.spaces, cost)
        parameters = Parameters(model, graph)
        self.counted = self.items if isinstance(cost, Parameters) else _items(model, graph, self.spaces, parameters)
        self.before = int(parameters.total)
        self.fixed = cost.total - sum(item.amount for item in self.items)
        self.choices: list[list[int]] = []  # widths, from the dense one down
        self._widths: list[Tensor] = []  # the same
        self.damages: list[Tensor] = []  # of these, by the objective
        self.losses: list[Tensor] = []  # of these, nats by the probe: what widths are chosen by
        self.errors: list[Tensor] = []
        self.eliminations: list[Elimination] = []
        for batch in statistics.batches([space.readers for space in self.spaces]):
            statistics.moments([name for index in batch for name in self.spaces[index].readers])
            for index in batch:
                self._measure(cal, self.spaces[index], objective, probe, options.round_channels)
                if progress:
                    progress("folding", len(self.choices), len(self.spaces))

    def _measure(
        self, cal: Calibration, space: HiddenSpace, objective: Objective, probe: FoldProbe | None, round_to: int
    ) -> None:
        readers = readers_of(cal.original, cal.graph, cal.statistics, space)
        shares = shares_of(cal.statistics, space, readers)
        found = elimination_of(readers, space, shares)
        self.eliminations.append(found)
        errors = torch.tensor(shares, dtype=torch.float64) @ found.errors
        gone = [0] + [n for n in range(1, found.errors.shape[1]) if (space.channels - n) % round_to == 0]
        self.choices.append([space.channels - n for n in gone])
        self._widths.append(torch.tensor(self.choices[-1], dtype=torch.float64))
        problems = [problem_of(cal.original, cal.graph, [name], cal.statistics) for name in space.readers]
        factors = [float(objective(problem, [name])[0]) for problem, name in zip(problems, space.readers, strict=True)]
        self.damages.append((torch.tensor(factors, dtype=torch.float64) @ found.errors)[gone])
        self.losses.append(errors[gone] * (1.0 if probe is None else probe(space, found, shares)))
        self.errors.append(found.errors.mean(0)[gone])

    def priced(self, cal: Calibration, cost: Cost) -> FoldLevels:
        """The same spaces and damages under another cost."""
        other = copy.copy(self)
        other.cost, other.items = cost, _items(cal.original, cal.graph, self.spaces, cost)
        other.fixed = cost.total - sum(item.amount for item in other.items)
        return other

    def blended(self, others: Sequence[FoldLevels], scales: Sequence[float]) -> FoldLevels:
        """The same spaces under the sum of the costs of ``others``, each times its scale."""
        pairs = [(other, scale) for other, scale in zip(others, scales, strict=True) if scale]
        result = copy.copy(self)
        result.items = [replace(item, amount=scale * item.amount) for other, scale in pairs for item in other.items]
        result.fixed = sum(scale * other.fixed for other, scale in pairs)
        return result

    @property
    def dense(self) -> list[int]:
        """The widths of the dense network."""
        return [space.channels for space in self.spaces]

    @property
    def floor(self) -> float:
        """Least cost that the whole network can have."""
        return self.total([row[-1] for row in self.choices])

    def total(self, widths: Sequence[int]) -> float:
        """Cost of the whole network with so many channels in its spaces."""
        return self.fixed + self._sum(self.items, widths)

    def parameters(self, widths: Sequence[int]) -> int:
        """Parameters of the whole network with so many channels in its spaces."""
        dense = sum(item.amount for item in self.counted)
        return round(self.before - dense + self._sum(self.counted, widths))

    def _sum(self, items: Sequence[_Item], widths: Sequence[int]) -> float:
        shares = [width / space.channels for width, space in zip(widths, self.spaces, strict=True)]
        return sum(item.amount * _share(shares, item.written) * _share(shares, item.read) for item in items)

    def slopes(self, widths: Sequence[int]) -> list[float]:
        """What one channel of every space costs, the others' widths being ``widths``."""
        shares = [width / space.channels for width, space in zip(widths, self.spaces, strict=True)]
        found = [0.0] * len(self.spaces)
        for item in self.items:
            if item.written >= 0:
                found[item.written] += item.amount * _share(shares, item.read)
            if item.read >= 0 and item.read != item.written:
                found[item.read] += item.amount * _share(shares, item.written)
        return [slope / space.channels for slope, space in zip(found, self.spaces, strict=True)]

    def layer_shares(self, widths: Sequence[int]) -> dict[str, float]:
        """What is left of the cost of every layer that gets smaller, 0 to 1, by name."""
        shares = [width / space.channels for width, space in zip(widths, self.spaces, strict=True)]
        found: dict[str, float] = {}
        for share, space in zip(shares, self.spaces, strict=True):
            for name in space.layers:
                found[name] = found.get(name, 1.0) * share
        return found

    def damage(self, widths: Sequence[int]) -> float:
        """What is lost, as the objective counts it."""
        return sum(
            float(values[row.index(width)]) for row, values, width in zip(self.choices, self.damages, widths, strict=True)
        )

    def at_price(self, price: float) -> list[int]:
        """The widths of least damage plus ``price`` times cost."""
        widths = self.dense
        for _ in range(SWEEPS):
            slopes = self.slopes(widths)
            found = [
                row[int((values + price * slope * widths_of_row).argmin())]
                for row, widths_of_row, values, slope in zip(self.choices, self._widths, self.losses, slopes, strict=True)
            ]
            if found == widths:
                break
            widths = found
        return widths

    def within(self, limit: float, budget: str = "") -> list[int]:
        """The widths of least damage that cost at most ``limit``.

        Args:
            budget: what the user wrote, for the message.

        Raises:
            SharefoldError: below the floor, which it says.
        """
        if self.total(self.dense) <= limit:
            return self.dense
        if limit < self.floor:
            raise SharefoldError(self.cost.below(limit, budget, self.floor, FOLD.name))
        scale = max(sum(float(v[-1]) for v in self.losses), 1e-12) / self.cost.total
        low, high = -12.0, 12.0  # in the logarithm to base 10, of prices in units of `scale`
        widths = [row[-1] for row in self.choices]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self.at_price(scale * 10**middle)
            if self.total(found) <= limit:
                high, widths = middle, found
            else:
                low = middle
        return self._filled(widths, limit)

    def _filled(self, widths: list[int], limit: float) -> list[int]:
        """Gives channels back, where a unit of cost saves most damage, as long as the budget lasts."""
        places = [row.index(width) for row, width in zip(self.choices, widths, strict=True)]
        spent = self.total(widths)
        while True:
            slopes = self.slopes(widths)
            best: tuple[float, int, float] | None = None
            for index, (row, values, place) in enumerate(zip(self.choices, self.losses, places, strict=True)):
                if place == 0:
                    continue
                price = slopes[index] * (row[place - 1] - row[place])
                gain = float(values[place] - values[place - 1])
                if spent + price <= limit and gain > 0 and (best is None or gain / max(price, 1e-30) > best[0]):
                    best = gain / max(price, 1e-30), index, price
            if best is None:
                return widths
            _, index, price = best
            places[index] -= 1
            widths[index] = self.choices[index][places[index]]
            spent += price

    def plan(self, widths: Sequence[int], budget: str) -> Plan:
        """The plan that folds to these widths and does nothing else; ``budget`` is what the user wrote."""
        source = f"budget {budget}, method {FOLD.name}"
        if self.cost.unit != "parameters":
            source += f": {self.cost.text(self.total(widths))} of {self.cost.text(self.cost.total)} expected"
        return Plan(self.plans(widths), self.before, self.parameters(widths), source)

    def plans(self, widths: Sequence[int]) -> list[GroupPlan]:
        """Group plans of the spaces that lose channels; a part that two spaces shrink counts for the first."""
        result: list[GroupPlan] = []
        shares = [1.0] * len(self.spaces)
        for index, (space, width) in enumerate(zip(self.spaces, widths, strict=True)):
            if width == space.channels:
                continue
            mine = [item for item in self.counted if index in (item.written, item.read)]
            before = sum(item.amount * _share(shares, item.written) * _share(shares, item.read) for item in mine)
            shares[index] = width / space.channels
            after = sum(item.amount * _share(shares, item.written) * _share(shares, item.read) for item in mine)
            error = float(self.errors[index][self.choices[index].index(width)])
            options = options_for(space, self.eliminations[index].kept(width))
            name, sizes = f"fold {space.writer}", (round(before), round(after))
            result.append(GroupPlan(name, FOLD.name, (space.writer,), options, *sizes, error, space.stage, space.role))
        return result


def _share(shares: Sequence[float], index: int) -> float:
    return 1.0 if index < 0 else shares[index]


def _items(model: nn.Module, graph: NetworkGraph, spaces: Sequence[HiddenSpace], cost: Cost) -> list[_Item]:
    """The cost of every layer and norm that a space makes smaller."""
    written: dict[str, int] = {}
    read: dict[str, int] = {}
    for index, space in enumerate(spaces):
        written.update(dict.fromkeys(space.carriers, index))
        read.update(dict.fromkeys(space.readers, index))
    items = []
    for name in {**written, **read}:
        if name in graph.layers:
            items.append(_Item(cost.dense(name), written.get(name, -1), read.get(name, -1)))
        if isinstance(cost, Parameters) and name in written:
            channels = spaces[written[name]].channels
            vectors = [
                p.numel() for key, p in model.get_submodule(name).named_parameters()
                if p.numel() > 1 and not (key == "weight" and name in graph.layers) and p.shape[0] == channels
            ]  # fmt: skip
            items.append(_Item(sum(vectors), written[name], -1))
    return [item for item in items if item.amount]
