"""Which calibration images say most: those that the network is least certain of.

A network knows its training images nearly by heart. On most of them its output hardly moves whatever is done to its
layers, and new images are not like that: what is fitted to the least certain half stays closer to the original on new
images. Weights that follow the entropy do worse than this choice: a few images then count for all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.measure import evaluating, first_logits, gives_logits, run_on

SHARE = 0.5
# Fewer would cost more in sampling noise than the choice gains.
FEWEST = 1000


def least_certain(model: nn.Module, images: Tensor, batch_size: int = 100) -> Tensor:
    """Indices (m,) int64, rising, of the images whose predictions have the highest entropy.

    Half of the images, and at least ``FEWEST``: of so few, and for networks that return no logits, all of them.

    Args:
        model: in eval mode during the call.
        images: (n, C, H, W), normalised as the network expects.
    """
    everything = torch.arange(len(images))
    count = max(FEWEST, round(SHARE * len(images)))
    if count >= len(images) or not gives_logits(model, images[:2]):
        return everything
    found = []
    with evaluating(model):
        for batch in images.split(batch_size):
            logits = first_logits(run_on(model, batch)).float()
            entropy = torch.special.entr(logits.softmax(1)).sum(1)
            found.append(entropy.reshape(len(batch), -1).mean(1).cpu())  # of every pixel, where those are the predictions
    return torch.cat(found).topk(count).indices.sort().values
