"""Top-1, top-5 and cross-entropy of a network on validation batches, over all processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.finetune.batches import EvalBatches
from sharefold.finetune.distributed import World
from sharefold.inputs import call
from sharefold.running import evaluating, has_doubles


def evaluate(
    model: nn.Module, batches: EvalBatches, world: World, autocast: Callable[[], AbstractContextManager]
) -> dict[str, float]:
    """{top1, top5, loss, images}; fractions of 1. The model is left in the mode it was in.

    Where labels are shares of classes, a hit is the class of the largest share.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device if has_doubles(world.device) else "cpu")
    with evaluating(model):
        for images, labels in batches:
            with autocast():
                logits = call(model, images)
            logits = logits.float()
            classes = labels.argmax(1) if labels.ndim == 2 else labels
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == classes[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            batch = [best[:, 0].sum(), best.sum(), loss]
            sums += torch.stack([value.float() for value in batch] + [torch.full_like(loss, len(labels))]).to(sums)
    top1, top5, loss, images_seen = world.sum(sums).tolist()
    if not images_seen:
        raise SharefoldError("finetune: there are no validation images")
    return {"top1": top1 / images_seen, "top5": top5 / images_seen, "loss": loss / images_seen, "images": images_seen}
