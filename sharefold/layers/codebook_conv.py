"""A layer whose filters, or whose kernel slices, are entries of a shared codebook."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sharefold.layers.bank import Bank
from sharefold.layers.form import ConvForm
from sharefold.layers.shared_conv import SharedConv


def code_dtype(entries: int) -> torch.dtype:
    """The smallest integer type whose values index ``entries`` codebook rows."""
    return torch.uint8 if entries <= 256 else torch.int16 if entries <= 32768 else torch.int32


class CodebookConv(SharedConv):
    """Filters (codes (O,)) or h x w slices (codes (O, I/groups)) looked up in the bank's ``codebook``.

    Args:
        form: the replaced layer's form.
        bank: holds ``codebook``: (entries, N) for filters, (entries, h*w) for slices.
        codes: integer indices; a buffer, counted in the file and not among the parameters.
        scale: (O,) per filter, or None.
    """

    bank: Bank
    codes: Tensor
    scale: nn.Parameter | None

    def __init__(
        self, form: ConvForm, bank: Bank, codes: Tensor, scale: Tensor | None = None, bias: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, bank, bias, gain)
        self.register_buffer("codes", codes)
        self.register_parameter("scale", None if scale is None else nn.Parameter(scale))

    def compose(self) -> Tensor:
        rows = cast(Tensor, self.bank.codebook)[self.codes.long()]
        weight = rows.reshape(self.form.weight_shape)
        return weight if self.scale is None else weight * self.scale[:, None, None, None]

    def pointers(self) -> dict[str, int]:
        return {"codes": len(cast(Tensor, self.bank.codebook))}
