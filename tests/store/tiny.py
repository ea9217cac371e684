"""A small network with all kinds of layers that the store treats differently."""

from __future__ import annotations

import torch
from networks import Block, made_once
from torch import Tensor, nn

from sharefold.convert import convert_
from sharefold.plans import GroupPlan, Plan


class Tiny(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, groups=(1, 2)) for _ in range(3)))
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def trained() -> Tiny:
    """Random weights and BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(3)
    model = Tiny()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    nn.init.normal_(model.head.weight, 0, 2)
    return model.eval()


def images(count: int = 48) -> Tensor:
    """Smooth random images, so that patches are correlated."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=12, mode="bilinear") + 0.1 * torch.randn(
        count, 3, 12, 12, generator=generator
    )


@made_once
def converted(
    *, shared: bool = True, method: str = "basis", alone: str = "spatial", pivoted: bool = False
) -> tuple[Tiny, Tiny]:
    """(dense original, converted network): one shared bank, a layer factored ``alone``, the rest dense."""
    original, model = trained(), trained()
    total = sum(p.numel() for p in model.parameters())
    pivots = {"pivoted": True} if pivoted else {}
    options = {"rank": 10, "width": 8} if method == "tucker" else {"rank": 10, **pivots}
    groups = [
        GroupPlan("first", method, ("blocks.0.conv1", "blocks.1.conv1"), options, 2592, 1320),
        GroupPlan("third", alone, ("blocks.2.conv1",), {"rank": 8, **pivots}, 1296, 576),
    ]
    convert_(model, Plan(groups if shared else [], total, total), calibration=images(), repair=False)
    return original, model
