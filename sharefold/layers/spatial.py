"""A layer split into a column filter and a row filter (h x 1, then 1 x w)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.layers.form import ConvForm
from sharefold.layers.shared import SharedConv


class SpatialConv(SharedConv):
    """Spatial SVD (Jaderberg et al., arXiv:1405.3866): What[o,i,a,b] = sum_r horizontal[o,r,b] vertical[r,i,a].

    Args:
        form: the replaced layer's form, ungrouped.
        vertical: (R, I, h, 1).
        horizontal: (O, R, 1, w).
    """

    def __init__(
        self, form: ConvForm, vertical: Tensor, horizontal: Tensor, bias: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, None, bias, gain)
        self.vertical = nn.Parameter(vertical)
        self.rank = vertical.shape[0]  # a plain int: fx would turn the shape into a proxy
        self.horizontal = nn.Parameter(horizontal)

    def compose(self) -> Tensor:
        return torch.einsum("orb,ria->oiab", self.horizontal[:, :, 0], self.vertical[..., 0])

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
        x = F.conv2d(x, self.vertical, None, (stride[0], 1), (pad[0], 0), (dilation[0], 1))
        return F.conv2d(x, self.horizontal, self.own_bias, (1, stride[1]), (0, pad[1]), (1, dilation[1]))

    def linear_part(self) -> tuple[Tensor, Tensor] | None:
        if self.form.standardize is not None:
            return None
        rank, channels, height, _ = self.vertical.shape
        width = self.form.kernel_size[1]
        # Filter (r, b) is column filter r placed in column b of the window.
        filters = self.vertical.new_zeros(rank, width, channels, height, width)
        for column in range(width):
            filters[:, column, :, :, column] = self.vertical[..., 0]
        return filters.flatten(0, 1), self.horizontal.flatten(1)

    def set_linear_part(self, coefficients: Tensor) -> None:
        with torch.no_grad():
            self.horizontal.copy_(coefficients.view_as(self.horizontal))
