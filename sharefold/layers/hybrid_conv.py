"""A layer whose filters are combinations of its group's shared filters and of column filters of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.layers.bank import Bank
from sharefold.layers.basis_conv import BasisConv, mixed
from sharefold.layers.column_filters import by_columns, column_moments, column_shape, compose_columns, in_every_column, splits
from sharefold.layers.form import ConvForm


class HybridConv(BasisConv):
    """What[o,i,a,b] = sum_r C[o,r,b] V[r,i,a] + sum_s C[o,s] B[s,i,a,b]: a spatial SVD and a shared basis in one.

    Args:
        form: the replaced layer's form, a convolution.
        coefficients: (O, r * w + R): of column filter j in column b of the kernel (column j * w + b), then of the bank's filters.
        bank: holds ``basis`` (R, I/groups, h, w) or a wider one, as for :class:`BasisConv`.
        vertical: own column filters (r, I/groups, h, 1); with ``pivots`` (r,), columns of the identity that are not kept,
            (r, I/groups * h - r). Every conv group uses them all.
    """

    def __init__(
        self, form: ConvForm, coefficients: Tensor, bank: Bank, vertical: Tensor, bias: Tensor | None = None,
        gain: Tensor | None = None, pivots: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, coefficients, bank, bias=bias, gain=gain, pivots=pivots)
        self.vertical = nn.Parameter(vertical)
        self.verticals = vertical.shape[0]  # plain ints, as `rank`
        self.own_columns = self.verticals * form.kernel_size[1]

    def columns(self, x: Tensor | None = None) -> Tensor:
        """The column filters (r, I/groups, h, 1); for an input ``x`` as :meth:`Bank.filters` does."""
        return self._own(self.vertical, x)

    def shared(self, x: Tensor | None = None) -> Tensor:
        """The bank's filters (R, I/groups, h, w), likewise."""
        assert self.bank is not None
        return self.bank.filters(self.form.kernel_size, x)[:, : self.form.weight_shape[1]]

    def filters(self, x: Tensor | None = None) -> Tensor:
        """All filters (r * w + R, I/groups, h, w), in the order of the coefficients."""
        return torch.cat([in_every_column(self.columns(x), self.form.kernel_size[1]), self.shared(x)])

    def _mixes(self) -> tuple[Tensor, Tensor]:
        """(O, r, 1, w) for the column filters and (O, R) for the bank's."""
        own, rest = self.coefficients[:, : self.own_columns], self.coefficients[:, self.own_columns :]
        return own.unflatten(1, (self.verticals, 1, -1)), rest

    def compose(self) -> Tensor:
        horizontal, mix = self._mixes()
        return compose_columns(self.columns(), horizontal) + (mix @ self.shared().flatten(1)).view(self.form.weight_shape)

    def factored_share(self) -> float:
        form = self.form
        if not splits(form):
            return float("inf")
        width = form.kernel_size[1]
        rows, shared = form.out_channels // form.groups, self.rank - self.own_columns
        # The vertical pass runs at full width: its stride applies to one axis only.
        own = self.verticals * (form.features // width * form.stride[1] + rows * width)
        return (own + shared * (form.features + rows)) / (rows * form.features)

    def parts(self, x: Tensor | None) -> tuple[Tensor | None, ...]:
        columns, shared = self.columns(x), self.shared(x)
        if (groups := self.form.groups) > 1:
            columns, shared = columns.repeat(groups, 1, 1, 1), shared.repeat(groups, 1, 1, 1)
        horizontal, mix = self._mixes()
        return columns, horizontal, self.own_bias, shared, mix[:, :, None, None]

    def by_parts(self, x: Tensor, *parts: Any) -> Tensor:
        *own, shared, mix = parts
        return by_columns(self.form, x, *own) + F.conv2d(self.form.apply(x, shared, None), mix, groups=self.form.groups)

    @property
    def pivoted_name(self) -> str | None:
        return "vertical"

    def pivoted_shape(self) -> tuple[int, ...]:
        return column_shape(self.form)

    def own_moments(self, moments: Tensor) -> Tensor:
        return super().own_moments(column_moments(moments, self.form))

    def own_power(self, power: Tensor) -> Tensor:
        return super().own_power(power).reshape(self.verticals, -1).sum(1)

    @torch.no_grad()
    def mix_own(self, matrix: Tensor) -> None:
        own = self.coefficients[:, : self.own_columns]
        by_column = own.unflatten(1, (self.verticals, -1)).transpose(1, 2)
        own.copy_(mixed(by_column, matrix).transpose(1, 2).flatten(1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.verticals} column filters"
