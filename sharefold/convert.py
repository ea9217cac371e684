"""Carries out a plan: solves every group, swaps the layers, and repairs without labels."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.architectures.bases import base_of
from sharefold.budget import Effort, parse_effort
from sharefold.calibration.calibrate import Calibration, calibration_of, copied
from sharefold.calibration.images import input_config
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.format import FileConfig, aliases_of, carry_config, check_dense, config_of
from sharefold.graph.preserved import buffers_kept, restored_on_error, tried
from sharefold.graph.trace import same_output
from sharefold.inputs import AnyInput
from sharefold.layers import Bank, shared_layers
from sharefold.measure import count_parameters
from sharefold.methods import Solution, step_named
from sharefold.methods.checks import check_written
from sharefold.methods.narrowing import narrow_, narrowed
from sharefold.methods.reached import check_reached
from sharefold.methods.sizes import counted
from sharefold.methods.solved import solution_of, solutions_of
from sharefold.options import CalibrationOptions, ConvertOptions, RefineOptions, chosen
from sharefold.outputs import Figure
from sharefold.outputs.agreement import mean_agreement
from sharefold.outputs.intervals import wilson
from sharefold.outputs.leaf import LOGITS
from sharefold.plans import GroupPlan, Plan, Progress
from sharefold.repair.batchnorm_statistics import NormStatistics
from sharefold.repair.brief import brief_refinement
from sharefold.repair.confidence import Confidence
from sharefold.repair.guard import Guard
from sharefold.repair.last_layers import LastLayers
from sharefold.repair.means import absorb_means
from sharefold.repair.refine import Refinement
from sharefold.repair.refit import Refit
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Repair, Work, repaired
from sharefold.settings import with_plain_settings
from sharefold.state_dicts import load_tensors, tensor_state
from sharefold.store import quantize_
from sharefold.store.held_codes import check_holds_none
from sharefold.store.plain_size import plain_bytes
from sharefold.store.refine_codes import efforts, refine_codes
from sharefold.store.settle import settle_rounded
from sharefold.store.tensor_spec import carry_spec
from sharefold.tensor_values import write

# In the order in which they run.
REPAIRS: tuple[Repair, ...] = (Refit(), NormStatistics(), LastLayers())


@dataclass
class Conversion:
    """What ``convert_`` did.

    Attributes:
        plan: the plan as carried out, with measured errors and resolved options.
        original: the dense network, a copy; the teacher of any fine-tuning.
        agreement: share of predicted classes that coincide on the part ``report`` of the calibration images, on which nothing
            was fitted or decided; NaN where there are too few images for such a part (:mod:`sharefold.calibration.parts`), and
            for networks that predict no classes.
        kl: divergence from the original on them: of a classifier the mean KL(original || converted) in nats, else the sum over
            outputs of errors as a share of what the output varies by; NaN likewise, and for those that return nothing to compare.
        outputs: a figure for people an output, with a 95 % interval, on the same images; none where there are none.
        agreement_interval: 95 % interval of the agreement on all images like these; None where it was not measured.
        report_images: how many images are behind it; 0 where nothing was measured.
        seen_before: whether the network was trained on these images, as far as its certainty tells: it then agrees with its
            conversion more often on them than on new ones.
        new_agreement: agreement on mild views of them, which stand for new images (:mod:`sharefold.calibration.new_images`);
            None where the network does not predict one class, or does not know those views itself.
        new_agreement_interval: 95 % interval, counting images, not views.
        steps: repairs, refinement and rounding, by name: whether they were kept, and the divergence around each.
        seconds: wall-clock seconds of each phase.
    """

    plan: Plan
    original: nn.Module
    agreement: float
    kl: float
    outputs: list[Figure] = field(default_factory=list)
    agreement_interval: tuple[float, float] | None = None
    report_images: int = 0
    seen_before: bool = False
    new_agreement: float | None = None
    new_agreement_interval: tuple[float, float] | None = None
    steps: dict[str, StepRecord] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@with_plain_settings
def convert_(
    model: nn.Module, plan: Plan, calibration: Calibration | AnyInput | None = None, options: ConvertOptions | None = None,
    progress: Progress | None = None, **overrides: Any,
) -> Conversion:  # fmt: skip
    """Converts ``model`` in place as ``plan`` says and returns what was done.

    Args:
        model: the dense network that the plan was made for.
        plan: from :func:`sharefold.plan`, a recipe, or :meth:`Plan.from_json`.
        calibration: the one that the plan was made with, so that nothing is measured twice; or (n, C, H, W) normalised
            images, no labels, or what else :func:`sharefold.calibrate` takes; by default procedural images.
        options: see :class:`sharefold.options.ConvertOptions`; its fields may be given by keyword.
        progress: called with (what, done, total).

    Raises:
        SharefoldError: the network is converted already, the plan does not fit the model, refinement is asked of a network
            that returns nothing to compare and no criterion is given, or the plan's store cannot hold the network. After this
            or any other exception the model is what it was.

    Warns:
        SharefoldWarning: refinement is asked for and nothing was shared.
    """
    wanted = chosen(options, overrides, ConvertOptions)
    if not isinstance(plan, Plan):
        raise SharefoldError(f"convert_: plan must be what sharefold.plan gives, not {type(plan).__name__}")
    check_holds_none(model, "convert")
    check_dense(model)
    known = CalibrationOptions(wanted.seed, outputs=wanted.outputs, criterion=wanted.criterion)
    cal = calibration_of(model, calibration, known)
    seconds: dict[str, float] = {}
    with restored_on_error(model), buffers_kept(model, norms=False):
        done, cal, steps = carry_out(model, plan, cal, wanted, seconds, progress)
        figures = reported(model, cal)
    teacher = copied(cal.original) if cal is calibration else cal.original
    return Conversion(done, teacher, **figures, steps={step.name: step for step in steps}, seconds=seconds)


def reported(model: nn.Module, cal: Calibration) -> dict[str, Any]:
    """The figures of :class:`Conversion` on the part ``report`` of the images, on which nothing was fitted or decided."""
    count = len(cal.parts.report)
    if not cal.comparable or not count:
        return {"agreement": math.nan, "kl": math.nan}
    found, figures = cal.reported.measure(model)
    result = {"agreement": mean_agreement(figures), "kl": found.mean, "outputs": figures, "report_images": count}
    agreed = [figure for figure in figures if figure.metric == "agreement"]
    if len(agreed) == 1:
        result["agreement_interval"] = agreed[0].interval
        leaf = cal.reading.classes
        one_class = len(cal.reading.leaves) == 1 and leaf is not None and leaf.kind == LOGITS and leaf.axis == 1
        if one_class and cal.has_views and cal.views_are_known:
            new = mean_agreement(cal.stand_ins.measure(model)[1])
            result |= {"seen_before": cal.seen_before, "new_agreement": new, "new_agreement_interval": wilson(new, count)}
    return result


def carry_out(
    model: nn.Module, plan: Plan, cal: Calibration, options: ConvertOptions, seconds: dict[str, float],
    progress: Progress | None = None,
) -> tuple[Plan, Calibration, list[StepRecord]]:  # fmt: skip
    """:func:`convert_` without its report, for trials: an image that is reported on is read once, at the end of all.

    Returns:
        The plan as carried out, the calibration of the network with its channels reordered (mostly ``cal``), the steps.
    """
    effort, for_codes = efforts(parse_effort(options.refine), plan)
    check_written(model, cal.graph, plan)
    if (effort or for_codes) is not None and not cal.comparable:
        raise SharefoldError("refine: this network returns nothing to learn from: convert without it, or give a criterion")
    with _timed(seconds, "solve"):
        narrow_(model, cal, plan.narrowing, progress)
        base = _aligned(model, plan, narrowed(cal, plan.narrowing))
        solutions = solutions_of(base, plan.sharing, progress)
    if not plan.narrowing:
        cal = base
    done = _install(model, plan, solutions, cal, base)
    check_reached(model, base.graph, plan, cal.example)
    carry_config(model, describe(cal, done, options.config))
    carry_spec(model, None)
    refinement = None if effort is None else Refinement(RefineOptions(effort.epochs, effort.seconds, seed=cal.seed))
    if options.repair and options.refine is None:
        refinement = brief_refinement(cal, plan)
    steps = _mended(model, done, cal, base, options, refinement, seconds, progress)
    _put_back(model, cal.original, plan)
    if plan.store:
        with _timed(seconds, "store"):
            steps += (found := rounded(model, plan, cal, progress, for_codes))
        for step in found[1:]:
            seconds[step.name] = step.seconds
            seconds["store"] -= step.seconds
    carry_config(model, replace(config_of(model), steps=tuple(steps)))
    return done, cal, steps


def _aligned(model: nn.Module, plan: Plan, cal: Calibration) -> Calibration:
    """The calibration of ``model`` once every group has reordered the channels that it wants to; mostly ``cal`` itself."""
    steps = [(step_named(group.method), group) for group in plan.sharing]
    if not any(step.may_align() for step, _ in steps):
        return cal
    original = copy.deepcopy(cal.original)
    if not any([step.align(original, cal.graph, cal.statistics, group) for step, group in steps]):
        return cal
    if not _answers_alike(original, cal):
        return cal  # somebody looks at the order of the channels who cannot be seen
    load_tensors(model, original.state_dict())
    return cal.of(original)


def _answers_alike(network: nn.Module, cal: Calibration) -> bool:
    """Whether ``network`` says of the example what the calibrated one does; True in half precision, where sums in another order
    cannot be told from that."""
    if next(network.parameters()).dtype not in (torch.float32, torch.float64):
        return True
    (wanted, _), (found, error) = tried(cal.original, cal.example), tried(network, cal.example)
    return not error and same_output(found, wanted)


def _install(model: nn.Module, plan: Plan, solutions: list[Solution], cal: Calibration, base: Calibration) -> Plan:
    """Swaps the layers of the narrowed network; gives the plan with measured errors and sizes."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    groups = [_measured(group, solution_of(cal, group)) for group in plan.narrowing]
    shared = [_measured(group, solution) for group, solution in zip(plan.sharing, solutions, strict=True)]
    groups += counted(base.original, shared)
    for group, solution in zip(plan.sharing, solutions, strict=True):
        step_named(group.method).install(model, group, solution)
    _freeze(model, frozen)
    if plan.sharing:
        absorb_means(base.original, model, base.graph, base.statistics.means, plan.protects)
    for group in plan.sharing:
        step_named(group.method).finish(model, base.graph, group)
    return replace(plan, groups=groups, params_before=count_parameters(cal.original), params_after=count_parameters(model))


def _mended(
    model: nn.Module, plan: Plan, cal: Calibration, base: Calibration, options: ConvertOptions, refinement: Refinement | None,
    seconds: dict[str, float], progress: Progress | None,
) -> list[StepRecord]:  # fmt: skip
    """Repairs and refinement, as far as they are asked for and something can decide on them; a record each."""
    reason, unshared = "", "nothing was shared, so that there is nothing to repair"
    repairs: tuple[Repair, ...] = REPAIRS if options.repair else ()
    last = [] if refinement is None else [refinement]
    if not plan.groups:
        reason = unshared
    elif not cal.comparable:
        reason = "the network returns nothing to decide by"
    if reason:
        if last:
            exact = f", and {plan.store} is next to exact" if plan.store and reason == unshared else ""
            warnings.warn(f"not refined: {reason}{exact}", SharefoldWarning, stacklevel=5)
        names = [Confidence.name] if repairs else []
        return [StepRecord(name, False, reason) for name in (*names, *(step.name for step in (*repairs, *last)))]
    records: list[StepRecord] = []
    work = Work(cal, model, plan, Guard(cal.decided), base, progress)
    if repairs:
        with _timed(seconds, "repair"):
            confidence = Confidence(work)
            records += repaired(work, (confidence, *repairs), confidence)
    if last:
        with _timed(seconds, "refine"):
            records += repaired(work, last)
    return records


def rounded(
    model: nn.Module, plan: Plan, cal: Calibration, progress: Progress | None, effort: Effort | None = None
) -> list[StepRecord]:
    """Rounds to what the file will hold, whatever it costs, which the record tells; then settles the scale of the logits.

    With ``effort`` the codes are refined, as a step of its own, of a network that returns something to compare.
    """
    assert plan.store is not None
    store, guard = plan.store, Guard(cal.decided) if cal.comparable else None
    if guard is None:
        return [StepRecord("store", True, details=quantize_(model, store, cal, cal.original, cal.seed, progress).details)]
    work, reports = Work(cal, model, plan, guard, cal, progress), []

    def change() -> dict[str, Any]:
        report = quantize_(model, store, cal, cal.original, cal.seed, progress)
        reports.append(report)
        found = settle_rounded(work, report)
        return {**report.details, **({"factors": found} if found else {})}

    steps = [guard.watch(model, "store", change)]
    if effort is not None:
        steps.append(refine_codes(work, reports[0], RefineOptions(effort.epochs, effort.seconds, seed=cal.seed)))
    return steps


@torch.no_grad()
def _put_back(model: nn.Module, original: nn.Module, plan: Plan) -> None:
    """Every tensor of a protected module as it was: a norm may have taken up the mean of a layer in front of it."""
    for name, module in original.named_modules():
        if not plan.protects(name):
            continue
        ours = model.get_submodule(name)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            found = getattr(ours, key, None)
            if isinstance(found, Tensor) and found.shape == tensor.shape:
                write(found, tensor)


def describe(cal: Calibration, plan: Plan, known: Mapping[str, Any] | None = None) -> FileConfig:
    """What ``save`` needs to know: how to build the dense architecture, how it wants its images, and the plan.

    ``base`` is what :func:`sharefold.open_source` noted on the model, or the registered architecture that its names
    and shapes identify; None for a network of the user's own, which ``load`` then asks for. Entries in ``known`` are
    taken over and not looked for.
    """
    known, original = known or {}, cal.original
    base = known["base"] if "base" in known else cal.solution("base", lambda: base_of(original, cal.example))
    state = tensor_state(original)
    aliases = aliases_of(state)
    return FileConfig(
        plan, base or None, known["pretrained_cfg"] if "pretrained_cfg" in known else input_config(original, cal.example),
        dense_bytes=plain_bytes({name: tensor for name, tensor in state.items() if name not in aliases}),
    )  # fmt: skip


def _freeze(model: nn.Module, frozen: set[str]) -> None:
    """What replaces frozen parameters is frozen, a bank where all that it replaces was."""
    readers: dict[Bank, list[bool]] = {}
    for name, layer in shared_layers(model).items() if frozen else ():
        still = f"{name}.weight" in frozen
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(f"{name}.bias" not in frozen if key == "own_bias" else not still)
        if layer.bank is not None:
            readers.setdefault(layer.bank, []).append(still)
    for bank, flags in readers.items():
        bank.requires_grad_(not all(flags))


def _measured(group: GroupPlan, solution: Solution) -> GroupPlan:
    error = None if solution.errors is None else float(solution.errors.mean())
    return replace(group, error=error, options={**group.options, **solution.options})


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
