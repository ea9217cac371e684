"""A layer split into a column filter and a row filter (h x 1, then 1 x w)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.layers.basis_conv import mixed
from sharefold.layers.column_filters import by_columns, column_moments, column_shape, compose_columns, in_every_column, splits
from sharefold.layers.form import ConvForm
from sharefold.layers.pivots import free_moments, whole_factor
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
    coefficients_name = "horizontal"

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
        return whole_factor(self.vertical, self.pivots, self.pivoted_shape(), self._kept_columns, x)

    def compose(self) -> Tensor:
        return compose_columns(self.columns(), self.horizontal)

    def factored_share(self) -> float:
        form = self.form
        if not splits(form):
            return float("inf")
        height, width = form.kernel_size
        # The vertical pass runs at full width: its stride applies to one axis only.
        vertical = self.rank * form.in_channels * height * form.stride[1]
        return (vertical + form.out_channels * self.rank * width) / (form.out_channels * form.features)

    def parts(self, x: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.columns(x), self.horizontal, self.own_bias

    def by_parts(self, x: Tensor, *parts: Any) -> Tensor:
        return by_columns(self.form, x, *parts)

    def linear_part(self) -> tuple[Tensor, Tensor] | None:
        if self.form.standardize is not None:
            return None
        return in_every_column(self.columns(), self.form.kernel_size[1]), self.horizontal.flatten(1)

    def set_linear_part(self, coefficients: Tensor) -> None:
        with torch.no_grad():
            self.horizontal.copy_(coefficients.view_as(self.horizontal))

    @property
    def pivoted_name(self) -> str | None:
        return "vertical"

    def pivoted_shape(self) -> tuple[int, ...]:
        return column_shape(self.form)

    def own_moments(self, moments: Tensor) -> Tensor:
        return free_moments(column_moments(moments, self.form), self.pivots)

    def own_power(self, power: Tensor) -> Tensor:
        return power.reshape(self.rank, -1).sum(1)

    @torch.no_grad()
    def mix_own(self, matrix: Tensor) -> None:
        self.horizontal.copy_(mixed(self.horizontal.transpose(1, 3), matrix).transpose(1, 3))
