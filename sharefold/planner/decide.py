"""The verb ``plan``: what every group shares, for one budget or many."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import nn

from sharefold.budget import Budget, Budgets, parse_combined
from sharefold.calibration.calibrate import Calibration, calibration_of
from sharefold.calibration.statistics import is_wide
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.format import check_dense
from sharefold.graph.hidden_channels import hidden_spaces
from sharefold.graph.preserved import preserved
from sharefold.inputs import AnyInput
from sharefold.layers import form_of
from sharefold.methods import AUTO, FOLD
from sharefold.options import CalibrationOptions, PlanOptions, chosen
from sharefold.planner.candidates import Candidates, find_candidates, method_text
from sharefold.planner.combined import Bounds, Combined, Unreachable, find_combined
from sharefold.planner.combined_mix import CombinedMixer
from sharefold.planner.costs import Cost, cost_of
from sharefold.planner.file_budget import fits_unrounded, plan_bytes
from sharefold.planner.fold_levels import FoldLevels
from sharefold.planner.fold_many import ManyLevels
from sharefold.planner.mixed import Mixer
from sharefold.planner.objectives import JOINT, objective_named
from sharefold.planner.search import Trials, search
from sharefold.plans import Plan, Progress
from sharefold.settings import with_plain_settings
from sharefold.untrusted import exclude_pattern, quoted


@with_plain_settings
def plan(
    model: nn.Module, budget: str | float | Budget | Budgets = "50%", calibration: Calibration | AnyInput | None = None,
    options: PlanOptions | None = None, progress: Progress | None = None, **overrides: Any,
) -> Plan:  # fmt: skip
    """Decides what every group of ``model`` shares so that the whole model fits ``budget``.

    Args:
        model: a dense network; not changed.
        budget: parameters, bytes, multiply-accumulates or latency, as :func:`sharefold.budget.parse_budget` reads it, or
            several of these that hold together, with commas between them (``"50%, 70% MACs"``). Bytes are those of the saved
            file, whose number types are then part of the plan. Latency is measured here, layer by layer, with torch's present
            number of threads.
        calibration: of :func:`sharefold.calibrate`, or (n, C, H, W) normalised images, no labels, or what else that takes; by
            default procedural images. Make a calibration where more than a plan is wanted: :func:`sharefold.convert_` then
            measures nothing again.
        options: see :class:`sharefold.options.PlanOptions`; its fields may be given by keyword.
        progress: called with (what, done, total).

    Returns:
        A plan at or under the budget.

    Raises:
        SharefoldError: a network that is converted already, unreachable budget (says the floor and what was left out),
            unknown method or objective, bad calibration images.
    """
    wanted = chosen(options, overrides, PlanOptions)
    check_dense(model)
    bounds = parse_combined(budget)
    known = CalibrationOptions(wanted.seed, outputs=wanted.outputs, criterion=wanted.criterion)
    cal = calibration_of(model, calibration, known)
    with preserved(cal.original):  # some networks draw random numbers or write on themselves whenever they run
        return Planner(cal, wanted, progress).plan(bounds)


class Planner:
    """Plans of one calibrated network for any number of budgets; what does not depend on the budget is made once.

    Args:
        options, progress: as for :func:`plan`.

    Raises:
        SharefoldError: unknown objective, or a network that is a single layer.

    Warns:
        SharefoldWarning: no module has a name that ``exclude`` matches.
    """

    def __init__(self, cal: Calibration, options: PlanOptions | None = None, progress: Progress | None = None) -> None:
        self.cal, self.options, self.progress = cal, PlanOptions() if options is None else options, progress
        objective_named(self.options.objective)
        _check_options(cal, self.options)
        self._costs: dict[str, Cost] = {}
        self._made: dict[str, Candidates] = {}
        self._levels: dict[str, FoldLevels] = {}
        self._combined: dict[tuple[tuple[str, ...], bool], Combined] = {}

    def candidates(self, unit: str = "parameters") -> Candidates:
        """What every group may become, priced in ``unit``; ``"bytes"`` are priced as parameters, for coding to make small.

        Those have no pivots: a whole basis can be turned so that its coefficients cost few bits, a pivoted one cannot, and
        loses more in rounding than it saves (``docs/planning.md``).
        """
        if unit not in self._made:
            coded = unit == "bytes"
            options = chosen(self.sharing, {"pivots": self.options.pivots and not coded}, PlanOptions)
            self._made[unit] = find_candidates(self.cal, options, self.cost(unit), self.progress)
        return self._made[unit]

    def levels(self, unit: str = "parameters") -> FoldLevels:
        """What the hidden spaces lose with their channels, priced in ``unit``; bytes as parameters."""
        unit = "parameters" if unit == "bytes" else unit
        if unit not in self._levels and self._levels:  # measured already: the prices alone are others
            self._levels[unit] = next(iter(self._levels.values())).priced(self.cal, self.cost(unit))
        if unit not in self._levels:
            spaces, _ = hidden_spaces(self.cal.original, self.cal.graph, self.options.exclude)
            # Which channels a wide layer could do without its moments do not say: they are in the space of its rows.
            spaces = [space for space in spaces if not any(_is_wide(self.cal.original, name) for name in space.readers)]
            self._levels[unit] = FoldLevels(self.cal, spaces, self.cost(unit), self.options, self.progress)
        return self._levels[unit]

    def cost(self, unit: str) -> Cost:
        """Prices in ``unit``, bytes as parameters; seconds are measured once, so that they are the same everywhere."""
        unit = "parameters" if unit == "bytes" else unit
        if unit not in self._costs:
            self._costs[unit] = cost_of(unit, self.cal.original, self.cal.graph, self.cal.example)
        return self._costs[unit]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of all that are allowed."""
        method = self.options.method
        return (*AUTO, FOLD.name) if method == "auto" else (method,) if isinstance(method, str) else tuple(method)

    @property
    def _folds(self) -> bool:
        """Whether channels are folded. The joint search does not: its trials have the widths of the dense network."""
        return FOLD.name in self.methods and (self.methods == (FOLD.name,) or self.options.objective != JOINT)

    @property
    def sharing(self) -> PlanOptions:
        """The options with the methods that share alone."""
        names = tuple(name for name in self.methods if name != FOLD.name)
        return self.options if self.options.method == "auto" else chosen(self.options, {"method": names}, PlanOptions)

    def plan(self, budget: str | float | Budget | Budgets) -> Plan:
        """A plan at or under the budget, or under all of several.

        Raises:
            SharefoldError: unreachable budget (says the floor), unknown method.
        """
        return replace(self._plan(parse_combined(budget)), exclude=self.options.exclude or "")

    def _plan(self, budgets: Budgets) -> Plan:
        file = next((part for part in budgets.parts if part.unit == "bytes"), None)
        others = [part for part in budgets.parts if part.unit != "bytes"]
        bounds = Bounds.of(others, [self.cost(part.unit) for part in others])
        if file is None:
            return self.all_at_most(bounds, budgets.text)
        source = f"budget {budgets.text}, method {method_text(self.options.method)}"
        if not others:
            return plan_bytes(self.cal, file, source, lambda limit: self._coded(limit, file.text), self.progress)
        plan = self.all_at_most(bounds, budgets.text)
        if fits_unrounded(self.cal, plan, file):
            return plan
        known = self.cost("parameters")

        def within(limit: int) -> Plan | None:
            try:
                return self.all_at_most(bounds.below(known, limit), budgets.text, coded=True)
            except Unreachable:
                return None

        return plan_bytes(self.cal, file, source, within, self.progress, free=False)

    def all_at_most(self, bounds: Bounds, budget: str, coded: bool = False) -> Plan:
        """The plan within all ``bounds``; ``budget`` is what the user wrote.

        Args:
            coded: whether it is for a file whose tensors are coded.

        Raises:
            Unreachable, SharefoldError: there is none; says the floors.
        """
        if len(bounds.units) == 1:
            limit = bounds.limits[0]
            if not coded:
                return self.at_most(bounds.units[0], limit, budget)
            plan = self._coded(int(limit), budget)
            if plan is None:
                raise Unreachable(f"budget {budget} is below what a file of this network can be shrunk to")
            return plan
        levels = ManyLevels([self.levels(unit) for unit in bounds.units]) if self._folds else None
        if self.methods == (FOLD.name,):
            assert levels is not None
            return levels.plan(bounds, budget)
        options = chosen(self.sharing, {"pivots": self.options.pivots and not coded}, PlanOptions)
        key = bounds.units, options.pivots
        if key not in self._combined:
            self._combined[key] = find_combined(self.cal, options, bounds.costs, self.progress)
        candidates = self._combined[key].within(bounds)
        if levels is None or not levels.one.spaces:
            return self.within(candidates, 0.0, budget)
        return CombinedMixer(self.cal, candidates, levels, options, self.progress).plan(budget)

    def at_most(self, unit: str, limit: float, budget: str) -> Plan:
        """The plan that costs at most ``limit``; ``budget`` is what the user wrote."""
        if self.methods == (FOLD.name,):
            levels = self.levels(unit)
            return levels.plan(levels.within(limit, budget), budget)
        candidates = self.candidates(unit)
        both = self.levels(unit) if self._folds else None
        if both is None or not both.spaces:
            return self.within(candidates, limit, budget)
        options = chosen(self.sharing, {"pivots": self.options.pivots and unit != "bytes"}, PlanOptions)
        return Mixer(self.cal, candidates, both, options, unit, self.progress).plan(limit, budget)

    def _coded(self, limit: int, budget: str) -> Plan | None:
        """The plan of at most so many parameters that are to be coded; None below the floor."""
        floors = [self.levels().floor] if self._folds else []
        if self.methods != (FOLD.name,):
            floors.append(self.candidates("bytes").floor)
        return None if limit < min(floors) else self.at_most("bytes", limit, budget)

    def within(self, candidates: Candidates, limit: float, budget: str) -> Plan:
        """The plan that costs at most ``limit``; ``budget`` is what the user wrote."""
        picks = candidates.pick(limit, budget)
        if self.options.objective == JOINT and candidates.alone() and self.cal.comparable:
            trials = Trials(self.cal, candidates)
            if trials.rounds:
                picks = search(candidates, trials, limit, picks, self.progress)
        return candidates.plan(picks, budget)


def _check_options(cal: Calibration, options: PlanOptions) -> None:
    if not options.round_channels >= 1:
        raise SharefoldError(f"round_channels={options.round_channels}: must be 1 or more")
    names = [name for name, _ in cal.original.named_modules()]
    if "" in cal.graph.layers:
        raise SharefoldError(
            "plan: the network is a layer alone, which nothing can replace from outside: wrap it, nn.Sequential(layer)"
        )
    pattern = exclude_pattern(options.exclude)
    if pattern is not None and not any(map(pattern.search, names)):
        warnings.warn(f"exclude {quoted(options.exclude)} matches no module of this network", SharefoldWarning, stacklevel=4)


def _is_wide(model: nn.Module, name: str) -> bool:
    form = form_of(model.get_submodule(name))
    return form is not None and is_wide(form)
