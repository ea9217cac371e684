"""Small networks and data for the tests of fine-tuning (also imported by the scripts they start)."""

from __future__ import annotations

import torch
from networks import Small
from torch import Tensor, nn

from sharefold.layers import Bank, BasisConv, add_bank, form_of


class Norm(nn.GroupNorm):
    """A norm whose result for one image does not depend on the others."""

    def __init__(self, width: int) -> None:
        super().__init__(2, width)


def shared_net(seed: int = 0, norm: type[nn.Module] = nn.BatchNorm2d, unique: int = 0, rank: int = 6) -> Small:
    """A Small whose block convolutions are combinations of one bank ``layer1`` (and ``unique`` own filters)."""
    torch.manual_seed(seed)
    net = Small(norm=norm)
    members = [(block, name) for block in net.layer1 for name in ("conv1", "conv2")]
    bank = add_bank(net, "layer1", Bank({"basis": torch.randn(rank, 8, 3, 3) / 8}, uses=len(members)))
    for block, name in members:
        own = torch.randn(unique, 8, 3, 3) / 8 if unique else None
        coefficients = torch.randn(8, rank + unique) / 2
        setattr(block, name, BasisConv(form_of(getattr(block, name)), coefficients, bank, unique=own))
    return net


def images_and_labels(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Four classes that differ in their mean colour: uint8 (N, 3, 8, 8) and labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=random)
    centre = torch.tensor([[60, 60, 60], [180, 60, 60], [60, 180, 60], [60, 60, 180]])[labels]
    noise = torch.randint(-40, 41, (count, 3, 8, 8), generator=random)
    return (centre[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def digest(model: nn.Module) -> str:
    """A hash of every tensor of a model, bit by bit."""
    import hashlib

    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        sha.update(name.encode() + value.contiguous().numpy().tobytes())
    return sha.hexdigest()
