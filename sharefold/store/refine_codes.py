"""Refinement of a network that was rounded: it learns what the original says, under rounding, and its file keeps its size."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace

from sharefold.budget import Effort
from sharefold.options import RefineOptions
from sharefold.plans import Plan
from sharefold.repair.confidence import Confidence
from sharefold.repair.refine import DEFAULT_SECONDS, checked, clock_for, training
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Work
from sharefold.state_dicts import trial
from sharefold.store.quantize import StoreReport
from sharefold.store.settle import settle_rounded
from sharefold.store.size import file_bytes
from sharefold.store.tensor_spec import StoreRequest, carry_spec, parse_store
from sharefold.store.trained_codes import TrainedCodes

NAME = "refine codes"
# Training leaves the scale of the logits open: factors of the best one up to this, either way, are plausible.
WIDEST_SCALE = 4.0


def refine_codes(work: Work, report: StoreReport, options: RefineOptions) -> StepRecord:
    """Trains ``work.model``, which was rounded as ``report`` says, in place.

    It is kept only if the divergence falls. An entropy coded file has then the size that was asked for, or at most the one that
    it had; others may be some bytes larger, by the scales of their rows. ``report`` is brought up to date.
    """
    model, guard = work.model, work.guard
    before = guard.current(model)
    options = checked(options)
    clock, codes = clock_for(work, options), TrainedCodes(model, report)
    kept, after = False, math.nan
    try:
        with trial(model) as tried:
            with closing(training(work, codes, clock, options, Confidence(work))) as loop:
                for _ in loop:
                    pass
            if codes.finite() and (spec := codes.settled()) is not None:
                found = replace(report, spec=spec, bytes=file_bytes(model, spec))
                now = guard.divergence(model)
                guard.settle(now)
                factors = settle_rounded(work, found, WIDEST_SCALE)
                after = guard.divergence(model) if factors else now
                if guard.better(after, before):
                    kept = True
                    tried.keep()
                    report.spec, report.bytes = found.spec, found.bytes
    finally:
        carry_spec(model, report.spec)
    guard.settle(after if kept else before)
    details = {
        "epochs": clock.epochs(), "seconds": clock.elapsed(), "changed": round(codes.changed(), 4), "file_bytes": report.bytes,
    }  # fmt: skip
    return StepRecord(NAME, kept, "", before, after, clock.elapsed(), details, guard.images)


def efforts(effort: Effort | None, plan: Plan) -> tuple[Effort | None, Effort | None]:
    """How much of ``effort`` is for the network before it is rounded, and how much for its codes: half of it each (the odd epoch
    for the codes), or all for one of them where the other has nothing to mend."""
    coarse = bool(plan.store) and worth_refining(parse_store(plan.store or ""))
    if effort is None or not coarse:
        return effort, None
    if not plan.groups:
        return None, effort
    if effort.epochs is None and effort.seconds is None:
        effort = Effort(seconds=DEFAULT_SECONDS)
    epochs, seconds = effort.epochs, None if effort.seconds is None else effort.seconds / 2
    if epochs is None:
        return Effort(seconds=seconds), Effort(seconds=seconds)
    return (Effort(epochs // 2, seconds) if epochs > 1 else None), Effort(epochs - epochs // 2, seconds)


def worth_refining(request: StoreRequest) -> bool:
    """Whether what ``request`` asks for is coarse enough to be mended: not halves, or eight bits a weight."""
    return request.kind == "coded" or (request.kind in ("grid", "codebook") and request.bits < 8)
