"""A layer whose filters are combinations of shared basis filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.layers.bank import Bank
from sharefold.layers.batchnorm import affine
from sharefold.layers.form import ConvForm
from sharefold.layers.pivots import free_moments, whole_factor
from sharefold.layers.shared_conv import SharedConv
from sharefold.layers.weight_cache import Kept


def mixed(coefficients: Tensor, matrix: Tensor) -> Tensor:
    """(..., S): coefficients (..., R) times ``matrix`` (R, S), in float64 on the CPU, which every device can hand over to."""
    return (coefficients.cpu().double() @ matrix.cpu().double()).to(coefficients)


class BasisConv(SharedConv):
    """What = C [U; B]: coefficients (O, Ru + R) times own filters U and the bank's shared basis B.

    Without a bank this is a plain low-rank layer; with a bank and no own filters it is a shared filter basis; with
    both, and a BatchNorm between filters and coefficients, it is the layer of Deeply Shared Filter Bases (Kang and
    Kim, NeurIPS 2021, https://openreview.net/forum?id=FSeEahKQBQl, where own filters come first).

    Args:
        form: the replaced layer's form.
        coefficients: (O, Ru + R).
        bank: holds ``basis`` (R, I/groups, h, w) or a wider one, whose first channels count here; or None.
        unique: own filters (Ru, I/groups, h, w), or None; with ``pivots`` (Ru,), as in a bank, (Ru, I/groups * h * w - Ru).
        norm: BatchNorm2d over the Ru + R filter outputs, or None. While it trains, the layer runs factored.
    """

    unique: nn.Parameter | None
    pivots: Tensor | None

    def __init__(
        self, form: ConvForm, coefficients: Tensor, bank: Bank | None = None, unique: Tensor | None = None,
        norm: nn.BatchNorm2d | None = None, bias: Tensor | None = None, gain: Tensor | None = None,
        pivots: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(form, bank, bias, gain)
        if norm is not None and (form.kind != "conv2d" or form.groups != 1):
            raise ValueError("a normalised basis needs an ungrouped convolution")
        self.coefficients = nn.Parameter(coefficients)
        self.rank = coefficients.shape[1]  # plain ints: fx would turn the shape into a proxy
        self.own_columns = 0 if unique is None else unique.shape[0]  # coefficients of own filters, in front of the bank's
        self.register_parameter("unique", None if unique is None else nn.Parameter(unique))
        self.register_buffer("pivots", pivots)
        self._kept_filters = Kept()
        self.norm = norm

    def filters(self, x: Tensor | None = None) -> Tensor:
        """Own filters, then the shared basis: (Ru + R, I/groups, h, w); for an input ``x`` as :meth:`Bank.filters` does."""
        parts = [] if self.unique is None else [self._own(self.unique, x)]
        if self.bank is not None:
            # A bank that serves layers of several widths is as wide as the widest.
            parts.append(self.bank.filters(self.form.kernel_size, x)[:, : self.form.weight_shape[1]])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _own(self, factor: Tensor, x: Tensor | None) -> Tensor:
        return whole_factor(factor, self.pivots, self.pivoted_shape(), self._kept_filters, x)

    def compose(self) -> Tensor:
        coefficients: Tensor = self.coefficients
        if self.norm is not None:
            coefficients = coefficients * affine(self.norm)[0]
        return (coefficients @ self.filters().flatten(1)).view(self.form.weight_shape)

    @property
    def bias(self) -> Tensor | None:
        if self.norm is None:
            return self.own_bias
        through = self.coefficients @ affine(self.norm)[1]
        return through if self.own_bias is None else through + self.own_bias

    def runs_factored(self) -> bool:
        if self.norm is not None and self.training:
            return True
        return super().runs_factored()

    def factored_share(self) -> float:
        rank, form = self.rank, self.form
        rows = form.out_channels // form.groups
        return rank * (form.features + rows) / (rows * form.features)

    def parts(self, x: Tensor | None) -> tuple[Tensor | None, ...]:
        filters, mix = self.filters(x), self.coefficients
        if self.form.groups > 1:
            filters = filters.repeat(self.form.groups, 1, 1, 1)
        return filters, mix if self.form.kind == "linear" else mix[:, :, None, None], self.own_bias

    def by_parts(self, x: Tensor, *parts: Any) -> Tensor:
        filters, mix, bias = parts
        responses = self.form.apply(x, filters, None)
        if self.form.kind == "linear":
            return nn.functional.linear(responses, mix, bias)
        if self.norm is not None:
            responses = self.norm(responses)
        return nn.functional.conv2d(responses, mix, bias, groups=self.form.groups)

    @property
    def keeps_parts(self) -> bool:
        return super().keeps_parts and (self.bank is None or self.unique is None)

    def linear_part(self) -> tuple[Tensor, Tensor] | None:
        if self.form.standardize is not None:
            return None
        filters = self.filters()
        if self.norm is not None:
            filters = filters * affine(self.norm)[0][:, None, None, None]
        return filters, self.coefficients

    def set_linear_part(self, coefficients: Tensor) -> None:
        with torch.no_grad():
            self.coefficients.copy_(coefficients)

    @property
    def pivoted_name(self) -> str | None:
        return None if self.unique is None else "unique"

    @property
    def own_filters(self) -> Tensor | None:
        return self.unique

    def pivoted_shape(self) -> tuple[int, ...]:
        return self.form.weight_shape[1:]

    def own_moments(self, moments: Tensor) -> Tensor:
        return free_moments(moments, self.pivots)

    def own_power(self, power: Tensor) -> Tensor:
        return power[: self.own_columns]

    @torch.no_grad()
    def mix_own(self, matrix: Tensor) -> None:
        self.coefficients[:, : self.own_columns] = mixed(self.coefficients[:, : self.own_columns], matrix)

    @torch.no_grad()
    def mix_shared(self, matrix: Tensor) -> None:
        self.coefficients[:, self.own_columns :] = mixed(self.coefficients[:, self.own_columns :], matrix)

    def bank_power(self, rows: Tensor) -> Tensor:
        shared = self.coefficients.detach().cpu().double()[:, self.own_columns :]
        return (shared * rows.cpu().double().unsqueeze(1)).T @ shared

    @property
    def turnable(self) -> bool:
        return self.norm is None and not self.own_columns

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank} ({self.own_columns} own)"
