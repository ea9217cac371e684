"""A layer split into a column filter and a row filter (h x 1, then 1 x w)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.layers.form import ConvForm
from sharefold.layers.pivots import with_pivots
from sharefold.layers.shared_conv import SharedConv
from sharefold.layers.weight_cache import Kept


class SpatialConv(SharedConv):
    """Spatial SVD (Jaderberg et al., arXiv:1405.3866): What[o,i,a,b] = sum_r horizontal[o,r,b] vertical[r,i,a].

    Args:
        form: the replaced layer's form, ungrouped.
        vertical: (R, I, h, 1); with ``pivots`` (R,), columns of the identity that are not kept, (R, I * h - R).
        horizontal: (O, R, 1, w).
    """

    pivots: Tensor | None

    def __init__(
        self, form: ConvForm, vertical: Tensor, horizontal: Tensor, bias: Tensor | None = None,
        gain: Tensor | None = None, pivots: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, None, bias, gain)
        self.vertical = nn.Parameter(vertical)
        self.rank = vertical.shape[0]  # a plain int: fx would turn the shape into a proxy
        self.horizontal = nn.Parameter(horizontal)
        self.register_buffer("pivots", pivots)
        self._kept_columns = Kept()

    def columns(self, x: Tensor | None = None) -> Tensor:
        """The column filters (R, I, h, 1); for an input ``x`` as :meth:`Bank.filters` does."""
        vertical, pivots = self.vertical, self.pivots
        if pivots is None:
            return vertical

        def make() -> Tensor:
            return with_pivots(vertical, pivots).reshape(self.rank, self.form.in_channels, self.form.kernel_size[0], 1)

        return self._kept_columns.get(x, (vertical, pivots), make)

    def compose(self) -> Tensor:
        return torch.einsum("orb,ria->oiab", self.horizontal[:, :, 0], self.columns()[..., 0])

    def factored_share(self) -> float:
        form = self.form
        if form.same_pad or form.padding_mode != "zeros" or isinstance(form.padding, str):
            return float("inf")
        height, width = form.kernel_size
        # The vertical pass runs at full width: its stride applies to one axis only.
        vertical = self.rank * form.in_channels * height * form.stride[1]
        return (vertical + form.out_channels * self.rank * width) / (form.out_channels * form.features)

    def factored(self, x: Tensor) -> Tensor:
        form = self.form
        pad, stride, dilation = form.padding, form.stride, form.dilation
        assert not isinstance(pad, str)
        columns = self.columns(None if self.training else x)
        x = F.conv2d(x, columns, None, (stride[0], 1), (pad[0], 0), (dilation[0], 1))
        return F.conv2d(x, self.horizontal, self.own_bias, (1, stride[1]), (0, pad[1]), (1, dilation[1]))

    def linear_part(self) -> tuple[Tensor, Tensor] | None:
        if self.form.standardize is not None:
            return None
        return in_every_column(self.columns(), self.form.kernel_size[1]), self.horizontal.flatten(1)

    def set_linear_part(self, coefficients: Tensor) -> None:
        with torch.no_grad():
            self.horizontal.copy_(coefficients.view_as(self.horizontal))

    def pointers(self) -> dict[str, int]:
        return {} if self.pivots is None else {"pivots": sum(self.vertical.shape)}


def in_every_column(vertical: Tensor, width: int) -> Tensor:
    """Filters (R * w, I, h, w) of column filters (R, I, h, 1): filter r * w + b is the r-th in column b of the window."""
    eye = torch.eye(width, dtype=vertical.dtype, device=vertical.device)
    return torch.einsum("ria,bc->rbiac", vertical[..., 0], eye).flatten(0, 1)
