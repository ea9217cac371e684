"""``plan``: what each group of a network shall share under a budget."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sharefold.budget import Budget, parse_budget
from sharefold.calibration.images import calibration_or_procedural
from sharefold.calibration.statistics import Statistics, statistics_of
from sharefold.graph import NetworkGraph, analyze
from sharefold.graph.preserved import preserved
from sharefold.measure import gives_logits
from sharefold.planner.candidates import Candidates, find_candidates
from sharefold.planner.costs import cost_of
from sharefold.planner.file_budget import plan_bytes
from sharefold.planner.objectives import JOINT, objective_named
from sharefold.planner.search import Trials, search
from sharefold.plans import DEFAULT_OBJECTIVE, Plan, Progress
from sharefold.settings import with_plain_settings


@with_plain_settings
def plan(
    model: nn.Module, example_input: Tensor | None = None, budget: str | float | Budget = "50%", *,
    calibration: Tensor | None = None, method: str | Sequence[str] = "auto", exclude: str | None = None,
    objective: str = DEFAULT_OBJECTIVE, pivots: bool = True, statistics: Statistics | None = None,
    graph: NetworkGraph | None = None, seed: int = 0, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """Decides what every group of ``model`` shares so that the whole model fits ``budget``.

    Args:
        model: a dense network; not changed.
        example_input: (B, C, H, W) for tracing, and for latency; by default one calibration image.
        budget: parameters, bytes, multiply-accumulates or latency, as :func:`sharefold.budget.parse_budget` reads it.
            Bytes are those of the saved file, whose number types are then part of the plan. Latency is measured here,
            layer by layer, with torch's present number of threads.
        calibration: (n, C, H, W) normalised images, no labels; by default procedural images.
        method: ``"auto"``, a method's name, or several.
        exclude: regular expression; layers whose name it matches stay as they are.
        objective: what is kept small: the layers' relative errors, each times a factor (``"fisher"``, ``"kl"``, ``"error"``:
            ``sharefold/planner/objectives.py``), or the whole network's output KL before repairs (``"joint"``).
        pivots: whether factors leave out the numbers that say nothing (:mod:`sharefold.solvers.interpolative`); without, they are
            whole and orthonormal. Budgets in bytes have whole ones.
        statistics, graph: of ``model``; reused when given.
        seed: of everything random.
        progress: called with (what, done, total).

    Returns:
        A plan at or under the budget.

    Raises:
        SharefoldError: unreachable budget (says the floor), unknown method or objective, bad calibration images.
    """
    bound = parse_budget(budget)
    images = calibration_or_procedural(model, calibration, seed) if statistics is None else statistics.images
    example = images[:1] if example_input is None else example_input
    if graph is None:
        graph = analyze(model, example)
    with preserved(model):
        if statistics is None:
            statistics = statistics_of(model, graph, images, seed)
        planner = Planner(
            model, graph, statistics, example, method=method, exclude=exclude, objective=objective, pivots=pivots,
            seed=seed, progress=progress,
        )  # fmt: skip
        return planner.plan(bound)


class Planner:
    """Plans of one network for any number of budgets; what does not depend on the budget is made once.

    Args:
        model, graph, statistics: the dense network, :func:`sharefold.analyze` of it, and its statistics.
        example_input: (B, C, H, W); latency is that of a batch of B.
        method, exclude, objective, pivots, seed, progress: as for :func:`plan`.

    Raises:
        SharefoldError: unknown objective.
    """

    def __init__(
        self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, example_input: Tensor, *,
        method: str | Sequence[str] = "auto", exclude: str | None = None, objective: str = DEFAULT_OBJECTIVE,
        pivots: bool = True, seed: int = 0, progress: Progress | None = None,
    ) -> None:  # fmt: skip
        objective_named(objective)
        self.model, self.graph, self.statistics, self.example = model, graph, statistics, example_input
        self.method, self.exclude, self.objective = method, exclude, objective
        self.pivots, self.seed, self.progress = pivots, seed, progress
        self._made: dict[str, Candidates] = {}

    def candidates(self, unit: str = "parameters") -> Candidates:
        """What every group may become, priced in ``unit``; ``"bytes"`` are priced as parameters, for coding to make small.

        Those have no pivots: a whole basis can be turned so that its coefficients cost few bits, a pivoted one cannot, and
        loses more in rounding than it saves (``docs/planning.md``).
        """
        if unit not in self._made:
            coded = unit == "bytes"
            cost = cost_of("parameters" if coded else unit, self.model, self.graph, self.example)
            self._made[unit] = find_candidates(
                self.model, self.graph, self.statistics, self.method, self.exclude, self.progress, cost, self.objective,
                self.pivots and not coded,
            )  # fmt: skip
        return self._made[unit]

    def plan(self, budget: str | float | Budget) -> Plan:
        """A plan at or under the budget.

        Raises:
            SharefoldError: unreachable budget (says the floor), unknown method.
        """
        bound = parse_budget(budget)
        if bound.unit == "bytes":
            return plan_bytes(self, bound)
        candidates = self.candidates(bound.unit)
        return self.within(candidates, bound.limit(candidates.cost.total), bound.text)

    def within(self, candidates: Candidates, limit: float, budget: str) -> Plan:
        """The plan that costs at most ``limit``; ``budget`` is what the user wrote."""
        picks = candidates.pick(limit, budget)
        if self.objective == JOINT and candidates.alone() and gives_logits(self.model, self.statistics.images[:2]):
            trials = Trials(self.model, self.graph, self.statistics, candidates)
            if trials.rounds:
                picks = search(candidates, trials, limit, picks, self.progress)
        return candidates.plan(picks, budget)
