"""``plan``: what each group of a network shall share under a budget."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from sharefold.budget import Budget, parse_budget
from sharefold.calibrate.inputs import calibration_or_procedural
from sharefold.calibrate.means import output_mean_owner
from sharefold.calibrate.statistics import Statistics
from sharefold.candidates import Candidates, find_candidates
from sharefold.graph import NetworkGraph, analyze
from sharefold.plans import Plan, Progress


def plan(
    model: nn.Module, example_input: Tensor | None = None, budget: str | float | Budget = "50%", *,
    calibration: Tensor | None = None, method: str | Sequence[str] = "auto", exclude: str | None = None,
    statistics: Statistics | None = None, graph: NetworkGraph | None = None, candidates: Candidates | None = None,
    seed: int = 0, progress: Progress | None = None,
) -> Plan:  # fmt: skip
    """Decides what every group of ``model`` shares so that the whole model fits ``budget``.

    Args:
        model: a dense network; not changed.
        example_input: (B, C, H, W) for tracing; by default one calibration image.
        budget: share, parameters or bytes, as :func:`sharefold.budget.parse_budget` reads it. Bytes are those of the
            saved file, whose number types are then part of the plan.
        calibration: (n, C, H, W) normalised images, no labels; by default procedural images.
        method: ``"auto"``, a method's name, or several.
        exclude: regular expression; layers whose name it matches stay as they are.
        statistics, graph, candidates: reused when given; candidates settle ``method`` and ``exclude``.
        seed: of everything random.
        progress: called with (what, done, total).

    Returns:
        A plan at or under the budget.

    Raises:
        SharefoldError: unreachable budget (says the floor), unknown method, bad calibration images.
    """
    bound = parse_budget(budget)
    images = calibration_or_procedural(model, calibration, seed) if statistics is None else statistics.images
    if graph is None:
        graph = analyze(model, images[:1] if example_input is None else example_input)
    if statistics is None:
        statistics = statistics_of(model, graph, images, seed)
    if candidates is None:
        candidates = find_candidates(model, graph, statistics, method, exclude, progress)
    if bound.unit == "bytes":
        from sharefold.file_budget import plan_bytes

        return plan_bytes(model, candidates, bound, graph, statistics, seed=seed, progress=progress)
    return candidates.pick(bound.parameters(candidates.before), bound.text)


def statistics_of(model: nn.Module, graph: NetworkGraph, images: Tensor, seed: int = 0) -> Statistics:
    """Statistics of all layers of ``graph``; a mean that a BatchNorm or bias can absorb is taken out."""
    centered = {
        name: output_mean_owner(model, model.get_submodule(name), record.norm) is not None
        for name, record in graph.layers.items()
    }
    batch = max(1, min(100, 100 * 3 * 64 * 64 // max(1, images[0].numel())))
    return Statistics(model, images, centered=centered, batch_size=batch, seed=seed)
