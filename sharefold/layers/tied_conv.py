"""A layer that uses the group's one kernel as it is, or with a scale per output channel and a small correction."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from sharefold.layers.bank import Bank
from sharefold.layers.form import ConvForm
from sharefold.layers.shared_conv import SharedConv


class TiedConv(SharedConv):
    """What = diag(scale) W (+ left right): the bank's kernel W (O, I/groups, h, w), shared by all members.

    Args:
        form: the replaced layer's form.
        bank: holds ``weight`` (O, I/groups, h, w), and ``bias`` (O,) when the members share that too.
        scale: (O,) per output channel, or None.
        left, right: (O, r) and (r, N) of a per-layer low-rank correction, or None.
    """

    bank: Bank
    scale: nn.Parameter | None
    left: nn.Parameter | None
    right: nn.Parameter | None

    def __init__(
        self, form: ConvForm, bank: Bank, scale: Tensor | None = None, left: Tensor | None = None,
        right: Tensor | None = None, bias: Tensor | None = None, gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, bank, bias, gain)
        self.register_parameter("scale", None if scale is None else nn.Parameter(scale))
        self.register_parameter("left", None if left is None else nn.Parameter(left))
        self.register_parameter("right", None if right is None else nn.Parameter(right))

    def compose(self) -> Tensor:
        weight = cast(Tensor, self.bank.weight)
        if self.scale is not None:
            weight = weight * self.scale[:, None, None, None]
        if self.left is not None and self.right is not None:
            weight = weight + (self.left @ self.right).view_as(weight)
        return weight

    def bank_power(self, rows: Tensor) -> Tensor:
        rows = rows.cpu().double()
        return rows if self.scale is None else rows * self.scale.detach().cpu().double().square()

    @property
    def bias(self) -> Tensor | None:
        shared = getattr(self.bank, "bias", None)
        return self.own_bias if shared is None else cast(Tensor, shared)
