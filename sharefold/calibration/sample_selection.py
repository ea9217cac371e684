"""Which calibration images say most: those that the network is least certain of.

A network knows its training images nearly by heart. On most of them its output hardly moves whatever is done to its
layers, and new images are not like that: what is fitted to the least certain half stays closer to the original on new
images. Weights that follow the entropy do worse than this choice: a few images then count for all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.inputs import Input
from sharefold.outputs import OutputReading, read_outputs
from sharefold.outputs.terms import log_shares
from sharefold.running import evaluating

SHARE = 0.5
# Fewer would cost more in sampling noise than the choice gains.
FEWEST = 1000


def least_certain(
    model: nn.Module, images: Input, batch_size: int = 100, reading: OutputReading | None = None
) -> Tensor:
    """Indices (m,) int64, rising, of the images whose predictions have the highest entropy.

    Half of the images, and at least ``FEWEST``: of so few, and for networks whose output is not one of class logits, all of them.

    Args:
        model: in eval mode during the call.
        images: (n, C, H, W), normalised as the network expects.
        reading: of ``model``; by default read here.
    """
    everything = torch.arange(len(images))
    count = max(FEWEST, round(SHARE * len(images)))
    if count >= len(images):
        return everything
    reading = read_outputs(model, images) if reading is None else reading
    leaf = reading.classes
    if leaf is None:
        return everything
    found = []
    with evaluating(model):
        for batch in images.split(batch_size):
            shares = log_shares(leaf, reading.run(model, batch)[0]).exp()
            found.append(torch.special.entr(shares).sum(-1).mean(1).cpu())  # of every position that is a prediction
    return torch.cat(found).topk(count).indices.sort().values
