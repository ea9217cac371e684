"""Convolutions of one to three axes and transposed ones, seen as convolutions of maps.

A transposed convolution is one of stride 1 over its input with zeros between the pixels (Dumoulin and Visin, arXiv:1603.07285);
a convolution of a volume is one of maps that have the slices of a window as channels. So every convolution has patches, moments
and a weight of the shape that the solvers know. It runs as torch runs it: only what looks into a layer takes its input as maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.solvers.data_norm import PAD_MODES

_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MODULES: dict[tuple[int, bool], Any] = {
    (3, False): nn.Conv3d, (1, True): nn.ConvTranspose1d, (2, True): nn.ConvTranspose2d, (3, True): nn.ConvTranspose3d,
}  # fmt: skip


@dataclass(frozen=True)
class StockAxes:
    """A Conv3d or a transposed convolution as torch has it, apart from its channels; sizes are one a spatial axis."""

    transposed: bool
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    padding_mode: str = "zeros"

    @property
    def rank(self) -> int:
        """How many spatial axes there are."""
        return len(self.kernel_size)

    @property
    def depth(self) -> int:
        """Slices of a window along the first of three axes; 1 for fewer axes."""
        return self.kernel_size[0] if self.rank == 3 else 1

    def pads(self) -> list[tuple[int, int]]:
        """What is added to the input as it is convolved, before and behind, an axis each; less than 0: taken away."""
        found = []
        for axis, (kernel, dilation) in enumerate(zip(self.kernel_size, self.dilation, strict=True)):
            reach = dilation * (kernel - 1)
            if self.padding == "valid":
                found.append((0, 0))
            elif isinstance(self.padding, str):
                found.append((reach // 2, reach - reach // 2))
            elif self.transposed:
                before = reach - self.padding[axis]
                found.append((before, before + self.output_padding[axis]))
            else:
                found.append((self.padding[axis], self.padding[axis]))
        return found

    def maps(self, x: Tensor) -> Tensor:
        """Inputs (..., I, D, H, W), (..., I, H, W) or (..., I, L) as maps, which a Conv2d without padding, of a transposed layer
        one of stride 1, turns into the outputs: (..., I, H', W'), of volumes (..., D', I * d, H', W')."""
        if self.transposed:
            x = _with_zeros_between(x, self.stride)
        x = self._padded(x)
        if self.rank == 3:
            span = self.dilation[0] * (self.depth - 1) + 1
            windows = x.unfold(-3, span, 1 if self.transposed else self.stride[0])[..., :: self.dilation[0]]
            return windows.movedim(-4, -5).movedim(-1, -3).flatten(-4, -3)  # (..., D', I, d, H, W)
        return x.unsqueeze(-2) if self.rank == 1 else x

    def output_maps(self, y: Tensor) -> Tensor:
        """Outputs of the layer as what a Conv2d makes of :meth:`maps`."""
        return y.movedim(-3, -4) if self.rank == 3 else y.unsqueeze(-2) if self.rank == 1 else y

    def stock_outputs(self, y: Tensor) -> Tensor:
        """The other way round."""
        return y.movedim(-4, -3) if self.rank == 3 else y.squeeze(-2) if self.rank == 1 else y

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes of the output's spatial axes for those of an input."""
        found = []
        for axis, (before, behind) in enumerate(self.pads()):
            whole = (size[axis] - 1) * self.stride[axis] + 1 if self.transposed else size[axis]
            length = whole + before + behind - self.dilation[axis] * (self.kernel_size[axis] - 1)
            found.append(length if self.transposed else (length - 1) // self.stride[axis] + 1)
        return tuple(found)

    def stock_weight(self, weight: Tensor, groups: int) -> Tensor:
        """A weight (O, N), or the same in more axes, as the layer holds it: (O, I/groups, ...), a transposed one mirrored and
        (I, O/groups, ...)."""
        weight = weight.reshape(len(weight), -1, *self.kernel_size)
        if not self.transposed:
            return weight
        axes = list(range(-self.rank, 0))
        turned = weight.flip(axes).unflatten(0, (groups, -1)).transpose(1, 2)  # (G, I/G, O/G, ...)
        return turned.flatten(0, 1)

    def weight_of(self, stock: Tensor, groups: int) -> Tensor:
        """(O, N) from the weight as the layer holds it."""
        if self.transposed:
            turned = stock.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            stock = turned.flip(list(range(-self.rank, 0)))
        return stock.flatten(1)

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """The layer on its own inputs, with the weight as it holds it.

        Args:
            output_size: of a transposed layer, sizes of the output's spatial axes, as torch's layers take them.

        Raises:
            ValueError: an output size that the layer does not reach, as torch's layers raise it.
        """
        if self.transposed:
            call = _TRANSPOSED[self.rank - 1]
            extra = self.output_padding if output_size is None else self._padding_for(x, output_size)
            return call(x, weight, bias, self.stride, self.padding, extra, groups, self.dilation)
        if self.padding_mode == "zeros":
            return F.conv3d(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return F.conv3d(self._padded(x), weight, bias, self.stride, 0, self.dilation, groups)

    def _padded(self, x: Tensor) -> Tensor:
        amounts = [amount for pair in reversed(self.pads()) for amount in pair]
        return F.pad(x, amounts, mode=PAD_MODES[self.padding_mode]) if any(amounts) else x

    def _padding_for(self, x: Tensor, wanted: Sequence[int]) -> tuple[int, ...]:
        """Output padding with which the output has these spatial sizes; sizes of all axes may be given."""
        usual = self.output_size(tuple(x.shape[-self.rank :]))
        least = [size - extra for size, extra in zip(usual, self.output_padding, strict=True)]
        found = tuple(int(size) - low for size, low in zip(list(wanted)[-self.rank :], least, strict=True))
        if any(not 0 <= extra < step for extra, step in zip(found, self.stride, strict=True)):
            most = [low + step - 1 for low, step in zip(least, self.stride, strict=True)]
            raise ValueError(f"requested an output size of {list(wanted)}, but valid sizes range from {least} to {most}")
        return found

    def module(self, inputs: int, outputs: int, groups: int, bias: bool) -> nn.Module:
        """A new layer of this kind."""
        more: dict[str, Any] = {"output_padding": self.output_padding} if self.transposed else {}
        return _MODULES[self.rank, self.transposed](
            inputs, outputs, self.kernel_size, stride=self.stride, padding=self.padding, dilation=self.dilation, groups=groups,
            bias=bias, padding_mode=self.padding_mode, **more,
        )  # fmt: skip


def axes_of(module: nn.Module) -> StockAxes | None:
    """Those of a Conv3d or a transposed convolution with torch's own forward, else None."""
    for (_, transposed), cls in _MODULES.items():
        if isinstance(module, cls) and _is_stock(type(module), cls):
            layer: Any = module
            padding = layer.padding if isinstance(layer.padding, str) else _ints(layer.padding)
            extra = _ints(layer.output_padding)
            kernel, stride, dilation = (_ints(size) for size in (layer.kernel_size, layer.stride, layer.dilation))
            return StockAxes(transposed, kernel, stride, padding, dilation, extra, layer.padding_mode)
    return None


def _is_stock(kind: Any, cls: Any) -> bool:
    names = ("forward", "_output_padding") if "Transpose" in cls.__name__ else ("forward", "_conv_forward")
    return all(getattr(kind, name) is getattr(cls, name) for name in names)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _with_zeros_between(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """``stride - 1`` zeros between neighbours of each of the last axes."""
    if all(step == 1 for step in stride):
        return x
    rank = len(stride)
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[-rank:], stride, strict=True)]
    spread = torch.zeros((*x.shape[:-rank], *sizes), dtype=x.dtype, device=x.device)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    spread[places] = x
    return spread
