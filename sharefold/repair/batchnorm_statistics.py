"""BatchNorm statistics of the converted network, re-estimated on the images that layers are fitted to.

That rescues a badly damaged network and harms a lightly damaged one: the guard decides, and a part of the way may be the best.
What a layer loses makes its outputs smaller, so that the old statistics understate what is left; but the new ones are noisy, and
take what is lost for granted.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from sharefold.repair.partial import Partial
from sharefold.repair.work import Work
from sharefold.running import batch_of, evaluating, run_on

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Images of a batch: its own variance is what counts, and of too few it is noise.
MOST, LEAST = 200, 16
# The way from the old statistics to the new ones is gone whole, or by these parts of it.
PARTS = 4


class NormStatistics:
    """Moves running means and variances to those of the images; where that does harm, a part of the way."""

    name = "norms"

    def refusal(self, work: Work) -> str:
        return "" if _norms(work) else "the network has no BatchNorm with running statistics"

    @torch.no_grad()
    def run(self, work: Work) -> Partial:
        norms, images = _norms(work), work.cal.fit_images
        old = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        saved = [(norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
        try:
            with evaluating(work.model):
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a cumulative average over all batches
                    norm.train()
                for batch in images.split(batch_of(images, MOST, LEAST)):
                    if len(batch) > 1:
                        run_on(work.model, batch)
        finally:
            for norm, (momentum, count) in zip(norms, saved, strict=True):
                norm.momentum = momentum
                if count is not None:
                    norm.num_batches_tracked.copy_(count)
        new = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]

        @torch.no_grad()
        def keep(parts: int) -> None:
            for norm, before, after in zip(norms, old, new, strict=True):
                for place, first, last in zip((norm.running_mean, norm.running_var), before, after, strict=True):
                    place.copy_(last if parts == PARTS else first.lerp(last, parts / PARTS))

        return Partial(PARTS, keep, lambda parts: {"step": parts / PARTS})


def _norms(work: Work) -> list[Any]:
    named = work.model.named_modules()
    return [m for name, m in named if isinstance(m, NORMS) and m.running_mean is not None and not work.plan.protects(name)]
