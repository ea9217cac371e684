"""A pointwise convolution as one or two grouped ones with a channel shuffle in between (kEffNet)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.layers.batchnorm import affine
from sharefold.layers.form import ConvForm


def interleave(x: Tensor, groups: int) -> Tensor:
    """Channel c of every group side by side: (B, C, H, W), as if reshaped to (groups, C / groups) and transposed."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedPointwise(nn.Module):
    """y = L(P K(x)) + K(x), or y = P K(x), with grouped 1x1 convolutions K and L and the interleaving P.

    Schwarz Schuler et al., "Grouped Pointwise Convolutions Reduce Parameters in Convolutional Neural Networks" (MENDEL
    2022, https://doi.org/10.13164/mendel.2022.1.023; first in FAIA 2021 for EfficientNet). K and L are each followed
    by the norm and the activation that the dense layer had; without L the dense layer's own norm and activation stay
    where they are, behind this layer.

    Args:
        form: the replaced layer's form, a 1x1 convolution of C input and F output channels.
        groups: g, a divisor of C and F.
        bias: whether K and L have one each.
        second: with L; the published rule has it where C >= F.
        shuffle: with P; it does nothing where F = g.
        norm: what follows K and L: K gets a copy, L the module itself. Only with ``second``.
        act: likewise; without parameters, so both use the module itself.
    """

    def __init__(
        self, form: ConvForm, groups: int, *, bias: bool, second: bool, shuffle: bool = True,
        norm: nn.Module | None = None, first_norm: nn.Module | None = None, act: nn.Module | None = None,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inputs, outputs = form.in_channels, form.out_channels
        self.form, self.groups, self.shuffle = form, groups, shuffle and outputs > groups
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Conv2d(inputs, outputs, 1, form.stride, groups=groups, bias=bias, **place)
        self.first_norm = first_norm
        self.second = nn.Conv2d(outputs, outputs, 1, groups=groups, bias=bias, **place) if second else None
        self.second_norm = norm
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F, H', W')."""
        first = self._finish(self.first(x), self.first_norm)
        mixed = interleave(first, self.groups) if self.shuffle else first
        if self.second is None:
            return mixed
        return self._finish(self.second(mixed), self.second_norm) + first

    def _finish(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        x = x if norm is None else norm(x)
        return x if self.act is None else self.act(x)

    @torch.no_grad()
    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Weight (F, C) and offset (F,) of the dense layer that computes the same in eval mode; None when an
        activation between K and L stands in the way."""
        steps = []
        for conv, norm in ((self.first, self.first_norm), (self.second, self.second_norm)):
            scale_shift = _affine_norm(norm, self.form.out_channels)
            if scale_shift is None or self.act is not None:
                return None
            if conv is not None:
                scale, shift = (t.to(conv.weight) for t in scale_shift)
                weight = torch.block_diag(*conv.weight.flatten(1).chunk(self.groups))
                offset = shift if conv.bias is None else shift + scale * conv.bias
                steps.append((scale[:, None] * weight, offset))
        weight, offset = steps[0]
        order = torch.arange(len(weight), device=weight.device)
        if self.shuffle:
            order = order.view(self.groups, -1).T.flatten()
        mixed, mixed_offset = weight[order], offset[order]
        if self.second is None:
            return mixed, mixed_offset
        return weight + steps[1][0] @ mixed, offset + steps[1][1] + steps[1][0] @ mixed_offset

    def extra_repr(self) -> str:
        return f"{self.form.in_channels}, {self.form.out_channels}, groups={self.groups}, shuffle={self.shuffle}"


def plain_norm(norm: nn.Module | None) -> bool:
    """Whether ``norm`` is affine in eval mode: none, or a BatchNorm with no activation of its own."""
    if norm is None or isinstance(norm, nn.Identity):
        return True
    act = getattr(norm, "act", None)
    return getattr(norm, "running_var", None) is not None and (act is None or isinstance(act, nn.Identity))


def _affine_norm(norm: nn.Module | None, channels: int) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a norm in eval mode, or None when it is not affine."""
    if not plain_norm(norm):
        return None
    if getattr(norm, "running_var", None) is None:
        return torch.ones(channels), torch.zeros(channels)
    return affine(norm)
