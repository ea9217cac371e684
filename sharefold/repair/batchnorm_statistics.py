"""BatchNorm statistics of the converted network, re-estimated on the images that layers are fitted to.

That rescues a badly damaged network and harms a lightly damaged one: the guard decides.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sharefold.repair.work import Work
from sharefold.running import evaluating, run_on

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BATCH = 200


class NormStatistics:
    """Replaces running means and variances by those of the images."""

    name = "norms"

    def refusal(self, work: Work) -> str:
        return "" if _norms(work) else "the network has no BatchNorm with running statistics"

    @torch.no_grad()
    def run(self, work: Work) -> Mapping[str, Any]:
        norms = _norms(work)
        saved = [(norm.momentum, copy.deepcopy(norm.num_batches_tracked)) for norm in norms]
        try:
            with evaluating(work.model):
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a cumulative average over all batches
                    norm.train()
                for batch in work.cal.fit_images.split(BATCH):
                    if len(batch) > 1:
                        run_on(work.model, batch)
        finally:
            for norm, (momentum, count) in zip(norms, saved, strict=True):
                norm.momentum = momentum
                if count is not None:
                    norm.num_batches_tracked.copy_(count)
        return {}


def _norms(work: Work) -> list[Any]:
    named = work.model.named_modules()
    return [m for name, m in named if isinstance(m, NORMS) and m.running_mean is not None and not work.plan.protects(name)]
