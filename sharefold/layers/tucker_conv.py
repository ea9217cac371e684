"""A shared filter basis that lives in a shared input space."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from sharefold.layers.basis_conv import BasisConv


class TuckerConv(BasisConv):
    """What = C B kron(A, I): the input passes the bank's 1x1 projection A, then its filters B, then the layer's own C.

    Tucker-2 (Kim et al., arXiv:1511.06530) with the input factor and the core shared by a group. The form is that of
    an ungrouped convolution.

    The bank holds ``projection`` (J, I) and ``basis`` (R, J, h, w).
    """

    def _shared(self) -> tuple[Tensor, Tensor]:
        """The bank's basis and projection."""
        assert self.bank is not None
        return cast(Tensor, self.bank.basis), cast(Tensor, self.bank.projection)

    def filters(self, x: Tensor | None = None) -> Tensor:
        """The filters on the layer's own input channels, (R, I, h, w)."""
        basis, projection = self._shared()
        return torch.einsum("rjhw,ji->rihw", basis, projection)

    def factored_share(self) -> float:
        form, width = self.form, len(self._shared()[1])
        # The projection runs before the stride.
        before = width * form.in_channels * form.stride[0] * form.stride[1]
        taps = form.kernel_size[0] * form.kernel_size[1]
        inner = self.rank * (width * taps + form.out_channels)
        return (before + inner) / (form.out_channels * form.features)

    def parts(self, x: Tensor | None) -> tuple[Tensor | None, ...]:
        basis, projection = self._shared()
        return projection[:, :, None, None], basis, self.coefficients[:, :, None, None], self.own_bias

    def by_parts(self, x: Tensor, *parts: Any) -> Tensor:
        projection, basis, mix, bias = parts
        # A projection without a bias commutes with every kind of padding.
        return F.conv2d(self.form.apply(F.conv2d(x, projection), basis, None), mix, bias)
