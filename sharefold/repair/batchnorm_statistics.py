"""BatchNorm statistics of the converted network, re-estimated only where that helps."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sharefold.measure import agreement, evaluating, run_on

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def reestimate_norms(
    original: nn.Module, model: nn.Module, images: Tensor, held_out: Tensor, batch_size: int = 200,
    before: float | None = None,
) -> dict:  # fmt: skip
    """Replaces running means and variances by those of ``images``, if KL(original || model) on ``held_out`` falls.

    Re-estimation rescues a badly damaged network and harms a lightly damaged one, hence the guard.

    Args:
        images: (n, C, H, W), normalised; the statistics are theirs.
        held_out: (m, C, H, W), which decide.
        before: KL of ``model`` as it is, nats, where that is known already.

    Returns:
        {"kept": bool, "kl_before": float, "kl_after": float}; {"kept": False} without BatchNorms.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        return {"kept": False}
    before = agreement(original, model, held_out).kl if before is None else before
    saved = [(n.running_mean.clone(), n.running_var.clone(), n.momentum, _count(n)) for n in norms]  # type: ignore[union-attr]
    kept = False
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average over all batches
                norm.train()
            for batch in images.split(batch_size):
                if len(batch) > 1:
                    run_on(model, batch)
        after = agreement(original, model, held_out).kl
        kept = after < before
    finally:
        for norm, (mean, variance, momentum, count) in zip(norms, saved, strict=True):
            norm.momentum = momentum
            if count is not None:
                norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
            if not kept:
                norm.running_mean.copy_(mean)  # type: ignore[union-attr]
                norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return {"kept": kept, "kl_before": before, "kl_after": after}


def _count(norm: nn.Module) -> Tensor | None:
    return copy.deepcopy(getattr(norm, "num_batches_tracked", None))
