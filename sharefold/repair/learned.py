"""What refinement moves: the parameters of a network, or what stands behind them in one that was rounded."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

SMALLEST_SCALE = 1e-2


class Learned(Protocol):
    """What an optimizer moves, and how the network gets it."""

    betas: tuple[float, float]

    def groups(self, step: float) -> list[dict[str, Any]]:
        """For AdamW; ``step``: the largest relative change of a tensor at once."""

    def take_gradients(self) -> None:
        """After the network's parameters have theirs."""

    def show(self) -> None:
        """Writes what was moved into the network."""

    def epoch_ends(self) -> None:
        """All images have been seen once more."""


class Parameters:
    """The parameters themselves."""

    betas = (0.9, 0.999)

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def groups(self, step: float) -> list[dict[str, Any]]:
        return [group_of(parameter, step) for parameter in self.parameters]

    def take_gradients(self) -> None: ...

    def show(self) -> None: ...

    def epoch_ends(self) -> None: ...


def group_of(parameter: nn.Parameter, step: float) -> dict[str, Any]:
    """A group of its own, with a rate proportional to the tensor's root mean square."""
    size = float(parameter.detach().float().square().mean().sqrt()) if parameter.numel() else 0.0
    return {"params": [parameter], "lr": step * max(size, SMALLEST_SCALE)}
