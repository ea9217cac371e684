"""A conversion in the hands of the repairs, fitted to these images and decided by those."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration, calibrate
from sharefold.calibration.parts import parts_of
from sharefold.graph import NetworkGraph
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.guard import Guard
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Repair, Work, repaired


def calibration_on(original: nn.Module, fitting: Tensor, held_out: Tensor, graph: NetworkGraph | None = None) -> Calibration:
    """A calibration of ``original`` whose part ``fit`` is ``fitting``; all others are from ``held_out``."""
    parts = next(parts for n in itertools.count(len(fitting)) if len((parts := parts_of(n)).fit) == len(fitting))
    images = fitting.new_empty(sum(len(part) for part in (parts.fit, parts.decide, parts.report)), *fitting.shape[1:])
    images[parts.fit] = fitting
    for part in (parts.decide, parts.report):
        images[part] = held_out[torch.arange(len(part)) % len(held_out)]
    cal = calibrate(original, images, graph=graph)
    assert torch.equal(cal.fit_images, fitting)
    return cal


def work_of(
    original: nn.Module, model: nn.Module, fitting: Tensor, held_out: Tensor, groups: Sequence[GroupPlan] = (),
    *, graph: NetworkGraph | None = None, now: float | None = None,
) -> Work:  # fmt: skip
    """``model``, a conversion of ``original``; all of ``held_out`` decide, without views."""
    cal = calibration_on(original, fitting, held_out, graph)
    return Work(cal, model, Plan(list(groups), 0, 0), Guard(cal.comparison(held_out), now), cal)


def done_by(repair: Repair, work: Work) -> StepRecord:
    """The record of one repair."""
    (record,) = repaired(work, [repair])
    assert record.name == repair.name
    return record
