"""What a conversion keeps, on labelled images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sharefold.data import loader
from sharefold.running import device_of


@torch.no_grad()
def measured(original: nn.Module, model: nn.Module, dataset: Any, batch: int = 50) -> dict[str, float]:
    """Top-1 of both, agreement and mean KL(original || model) on labelled images."""
    device = device_of(original)
    right = dense = same = total = 0
    divergence = 0.0
    original.eval(), model.eval()
    for pixels, classes in loader(dataset, batch):
        images, labels = pixels.to(device).contiguous(memory_format=torch.channels_last), classes.to(device)
        a, b = original(images), model(images)
        dense += int((a.argmax(1) == labels).sum())
        right += int((b.argmax(1) == labels).sum())
        same += int((a.argmax(1) == b.argmax(1)).sum())
        divergence += float(F.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="sum", log_target=True))
        total += len(labels)
    shares = {"top1_dense": dense / total, "top1": right / total, "agreement": same / total}
    return {**shares, "kl": divergence / total, "images": total}
