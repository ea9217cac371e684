"""The short refinement that belongs to the repairs: a few epochs, where they take about as long as the other repairs.

Layer by layer the repairs bring each output near to the original's. What is left is spread over all layers, and a few steps that
see the whole network mend more of it than any further repair does (docs/log.md). At the size of ImageNet they would take minutes
and mend little: there refinement is for those who ask for it.
"""

from __future__ import annotations

import torch

from sharefold.calibration.calibrate import Calibration
from sharefold.inputs import Input, each_of
from sharefold.measure import count_macs
from sharefold.options import RefineOptions
from sharefold.plans import Plan
from sharefold.repair.refine import Refinement
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Work
from sharefold.running import dtype_of
from sharefold.untrusted import first_line

EPOCHS = 5
# Fewer images than this to learn from would be learned by heart.
FEWEST_IMAGES = 500
# Numbers in an image (or another sample), and multiply-accumulates of both networks in all epochs: some two minutes of one core.
LARGEST_SAMPLE, MOST_WORK = 3 * 64 * 64, 5e12
# Of a training step, over those of one network that only answers: the original answers, the conversion answers and learns.
PASSES = 4
# A network that diverges by less has nothing to mend that so short a run could: nats where it predicts classes, else the share of
# what its outputs vary by.
NEARLY_NATS, NEARLY_SHARE = 0.01, 1e-4


class BriefRefinement(Refinement):
    """:class:`sharefold.repair.refine.Refinement` for the few epochs of :func:`brief_refinement`."""

    def refusal(self, work: Work) -> str:
        nearly = NEARLY_SHARE if work.cal.reading.classes is None else NEARLY_NATS
        if work.guard.current(work.model) < nearly:
            return "the network already says nearly what the original says"
        return super().refusal(work)

    def run(self, work: Work) -> StepRecord:
        """Nobody has asked for it: a network that cannot be trained, whatever it raises, is left as the other repairs left it."""
        try:
            return super().run(work)
        except Exception as error:
            return StepRecord(self.name, False, f"the network cannot be trained ({first_line(error)})")


def brief_refinement(cal: Calibration, plan: Plan) -> BriefRefinement | None:
    """The short refinement of a conversion by ``plan``; None where it would take long or mend nothing."""
    images = cal.fit_images
    if not plan.groups or not cal.comparable or dtype_of(cal.original) != torch.float32:
        return None
    if len(images) < FEWEST_IMAGES or _numbers(images) > LARGEST_SAMPLE:
        return None
    try:
        macs = count_macs(cal.original, images[:1])
    except Exception:  # a network that takes no single sample, or does what cannot be counted: nobody has asked for this
        return None
    epochs = min(EPOCHS, int(MOST_WORK / max(PASSES * len(images) * macs, 1)))
    return BriefRefinement(RefineOptions(epochs, seed=cal.seed)) if epochs else None


def _numbers(samples: Input) -> int:
    return sum(tensor[0].numel() for tensor in each_of(samples))
