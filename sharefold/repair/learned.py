"""What refinement moves: the parameters of a network, or what stands behind them in one that was rounded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import nn

from sharefold.data.views import PASTE
from sharefold.layers import form_of
from sharefold.repair.muon import Muon, suits
from sharefold.tensor_values import is_expanded

SMALLEST_SCALE = 1e-2
# Steps of matrices, which go in all directions at once, beside those of other tensors.
MATRIX = 0.4


class Learned(Protocol):
    """What optimizers move, and how the network gets it.

    Attributes:
        paste: share of the views that have a rectangle of another image in them.
    """

    paste: float

    def optimizers(self, step: float) -> list[torch.optim.Optimizer]:
        """``step``: the largest relative change of a tensor at once."""

    def take_gradients(self) -> None:
        """After the network's parameters have theirs."""

    def show(self) -> None:
        """Writes what was moved into the network."""

    def epoch_ends(self) -> None:
        """All images have been seen once more."""


class Parameters:
    """The parameters of ``model`` themselves: matrices by Muon, everything else by AdamW.

    Args:
        but: ``id`` of parameters that stay as they are.
    """

    paste = PASTE

    def __init__(self, model: nn.Module, but: Collection[int] = ()) -> None:
        self.model = model
        # Optimizers cannot write to expanded ones.
        self.moved = [p for p in model.parameters() if p.is_floating_point() and id(p) not in but and not is_expanded(p)]

    def optimizers(self, step: float) -> list[torch.optim.Optimizer]:
        blocks = {id(m.weight): form.groups for m in self.model.modules() if (form := form_of(m)) is not None}
        matrices, others = [], []
        for parameter in self.moved:
            many = blocks.get(id(parameter), 1)
            if suits(tuple(parameter.shape), many):
                matrices.append({**group_of(parameter, MATRIX * step), "blocks": many})
            else:
                others.append(group_of(parameter, step))
        return [*([Muon(matrices)] if matrices else []), *([adamw(others)] if others else [])]

    def take_gradients(self) -> None: ...

    def show(self) -> None: ...

    def epoch_ends(self) -> None: ...


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, weight_decay=0.0, betas=betas)


def group_of(parameter: nn.Parameter, step: float) -> dict[str, Any]:
    """A group of its own, with a rate proportional to the tensor's root mean square."""
    size = float(parameter.detach().float().square().mean().sqrt()) if parameter.numel() else 0.0
    return {"params": [parameter], "lr": step * max(size, SMALLEST_SCALE)}
