"""Rounding a converted network to a small file after the fact: fine-tuned ones, or those converted to a number of parameters."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from torch import nn

from sharefold.budget import Effort, parse_budget, parse_effort
from sharefold.calibration.calibrate import Calibration, calibrate
from sharefold.convert import Conversion, reported, rounded
from sharefold.errors import SharefoldError
from sharefold.format import carry_config, config_of, without_figures
from sharefold.graph.preserved import restored_on_error
from sharefold.inputs import AnyInput
from sharefold.layers.surgery import to_dense
from sharefold.options import CalibrationOptions, RoundOptions, chosen
from sharefold.plans import Progress
from sharefold.repair.step_record import ROUND
from sharefold.settings import with_plain_settings
from sharefold.store import parse_store
from sharefold.store.held_codes import check_holds_none
from sharefold.store.refine_codes import worth_refining
from sharefold.store.tensor_spec import carry_spec


@with_plain_settings
def round_(
    model: nn.Module, store: str, images: AnyInput | None = None, options: RoundOptions | CalibrationOptions | None = None,
    progress: Progress | None = None, **overrides: Any,
) -> Conversion:  # fmt: skip
    """Rounds ``model`` in place to what :func:`sharefold.save` will then write in few bytes.

    The network as it is, fine-tuned or not, is what the rounded one is compared with and fitted to: figures say what rounding
    costs, not what conversion did.

    Args:
        model: a converted network; one that was rounded before is rounded from the values that it has now.
        store: ``int2`` to ``int8``, ``kmeans2`` to ``kmeans8``, ``fp16``, or the bytes of the file, ``60kB`` or ``mixed:60kB``.
        images: (n, C, H, W) normalised images, no labels, or what else :func:`sharefold.calibrate` takes; by default procedural
            ones.
        options: how they are used; what outputs are; how long the codes learn afterwards. Fields may be given by keyword.
        progress: called with (what, done, total).

    Returns:
        What was done, as of a conversion: the plan with its new ``store``, the network before as ``original``, the step ``round``
        (and ``refine codes``, if asked for) and figures on images on which nothing was fitted or decided.

    Raises:
        SharefoldError: not converted, an unknown kind, too small a budget; refinement of what is not coarse enough to gain by it,
            or of a network that returns nothing to compare. After this or any other exception the model is what it was.
    """
    if not isinstance(options, RoundOptions):
        options = RoundOptions(**{} if options is None else vars(options))
    return round_with(model, store, images, chosen(options, overrides, RoundOptions), progress)[0]


def round_with(
    model: nn.Module, store: str, images: AnyInput | None, options: RoundOptions, progress: Progress | None = None
) -> tuple[Conversion, Calibration]:  # fmt: skip
    """:func:`round_`, and the calibration that it was done with."""
    kind = store_of(store)
    effort = checked_effort(options, kind)
    check_holds_none(model, "round")
    config = config_of(model)
    start = time.perf_counter()
    original = to_dense(model).eval()
    for carry in (carry_config, carry_spec):
        carry(original, None)  # a stock network, whose every layer may be looked at
    cal = calibrate(original, images, options)
    if effort is not None and not cal.comparable:
        raise SharefoldError("round: this network returns nothing to learn from: do not refine it, or give a criterion")
    plan = replace(config.plan, store=kind)
    with restored_on_error(model):
        carry_config(model, replace(without_figures(config), plan=plan))  # which takes room in the file
        step, *refined = rounded(model, plan, cal, progress, effort)
        steps = [replace(step, name=ROUND), *refined]
        figures = reported(model, cal)
        carry_config(model, replace(without_figures(config), plan=plan, steps=tuple(steps)))
    seconds = {ROUND: round(time.perf_counter() - start - sum(step.seconds for step in steps[1:]), 3)}
    seconds |= {step.name: round(step.seconds, 3) for step in steps[1:]}
    return Conversion(plan, cal.original, **figures, steps={step.name: step for step in steps}, seconds=seconds), cal


def checked_effort(options: RoundOptions, kind: str) -> Effort | None:
    """How long codes of this ``kind`` of store are refined.

    Raises:
        SharefoldError: no effort, or a kind that refining cannot mend.
    """
    effort = parse_effort(options.refine)
    if effort is not None and not worth_refining(parse_store(kind)):
        raise SharefoldError(f"round: {kind} is next to exact, so that refining has nothing to mend: leave it out, or take a "
                             "coarser store such as int4 or 60kB")  # fmt: skip
    return effort


def store_of(text: str) -> str:
    """The kind of store that ``text`` means: itself, or ``mixed:`` with the bytes of a budget.

    Raises:
        SharefoldError: neither.
    """
    if not isinstance(text, str):
        raise SharefoldError(f"round: the store must be a text such as int8 or 60kB, not {text!r}")
    try:
        parse_store(text)
    except SharefoldError as unknown:
        try:
            budget = parse_budget(text)
        except SharefoldError:
            raise unknown from None
        if budget.unit != "bytes":
            raise SharefoldError(f"round: {text!r} is no size of a file: write 60kB, or a kind such as int8") from None
        return f"mixed:{int(budget.value)}B"
    return text
