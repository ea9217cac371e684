"""How a dense layer uses its weight: geometry, padding rule, weight standardisation.

Every shared layer holds the form of the layer that it replaces, so that Conv1d, Conv2d, Conv3d, transposed convs, Linear,
TensorFlow-"SAME" convs and weight-standardised convs all go through one piece of code, as convolutions of maps: a Conv1d is a
Conv2d of maps that are one pixel high; for the others see :mod:`sharefold.layers.stock_axes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from timm.layers import Linear as TimmLinear
from torch import Tensor, nn

from sharefold.layers.stock_axes import StockAxes, axes_of

# Classes whose objects are layers, shareable or not.
STOCK_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
)  # fmt: skip
_CALLED = ("__call__", "_call_impl")  # what torch calls around a forward
_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@dataclass(frozen=True)
class ConvForm:
    """What a convolution (or a Linear, as a 1x1 convolution of the last axis) is, apart from its weight.

    ``kind`` is ``"conv2d"``, ``"conv1d"``, ``"conv3d"``, ``"conv_transpose2d"`` (1d, 3d) or ``"linear"``; sizes are those of
    maps, of a Conv1d (1, k) for its k. ``stock`` is what a Conv3d or a transposed layer has instead: the rest then tells the
    Conv2d that it is of its maps, without padding, and ``depth`` how many slices of a volume are channels of a map.
    ``padding`` is a pair or ``"same"``/``"valid"``; ``same_pad`` is TensorFlow's input-dependent padding (timm's
    Conv2dSame); ``standardize`` is None or (eps, scale) of weight standardisation (Qiao et al., arXiv:1903.10520;
    scaled: Brock et al., arXiv:2101.08692, with a learned gain per output channel).
    """

    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    same_pad: bool = False
    standardize: tuple[float, float] | None = None
    module_class: str = ""
    stock: StockAxes | None = None

    @property
    def depth(self) -> int:
        """Slices of a volume in one window, which are channels of its map; 1 but for volumes."""
        return 1 if self.stock is None else self.stock.depth

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """(O, I/groups * depth, h, w)."""
        return (self.out_channels, self.in_channels // self.groups * self.depth, *self.kernel_size)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight lies (I, O/groups, ...)."""
        return self.stock is not None and self.stock.transposed

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution, of maps or of signals."""
        return self.kind != "linear"

    @property
    def stock_shape(self) -> tuple[int, ...]:
        """The shape of the stock layer's weight: (O, I/groups, h, w), (O, I/groups, k), (O, I/groups, d, h, w), of a transposed
        one (I, O/groups, ...), or (O, I) of a Linear."""
        if self.stock is not None:
            pair = (self.in_channels, self.out_channels) if self.transposed else (self.out_channels, self.in_channels)
            return (pair[0], pair[1] // self.groups, *self.stock.kernel_size)
        if self.kind == "linear":
            return self.out_channels, self.in_channels
        return (*self.weight_shape[:2], self.kernel_size[1]) if self.kind == "conv1d" else self.weight_shape

    @property
    def channel_axis(self) -> int:
        """Where the channels of inputs and outputs lie, from the end."""
        if self.stock is not None:
            return -1 - self.stock.rank
        return {"linear": -1, "conv1d": -2, "conv2d": -3}[self.kind]

    @property
    def stock_kernel_size(self) -> tuple[int, ...]:
        """As the stock layer has it: of a Conv1d the second alone."""
        if self.stock is not None:
            return self.stock.kernel_size
        return self.kernel_size[1:] if self.kind == "conv1d" else self.kernel_size

    @property
    def stock_stride(self) -> tuple[int, ...]:
        """As the stock layer has it."""
        if self.stock is not None:
            return self.stock.stride
        return self.stride[1:] if self.kind == "conv1d" else self.stride

    @property
    def stock_padding(self) -> tuple[int, ...] | str:
        """As the stock layer has it."""
        if self.stock is not None:
            return self.stock.padding
        return self.padding[1:] if self.kind == "conv1d" and not isinstance(self.padding, str) else self.padding

    @property
    def stock_dilation(self) -> tuple[int, ...]:
        """As the stock layer has it."""
        if self.stock is not None:
            return self.stock.dilation
        return self.dilation[1:] if self.kind == "conv1d" else self.dilation

    def as_maps(self, x: Tensor) -> Tensor:
        """Inputs of the stock layer as :meth:`apply` takes them: signals (..., C, L) as maps (..., C, 1, L); see
        :meth:`StockAxes.maps` for others. Volumes get one axis more than maps have."""
        if self.stock is not None:
            return self.stock.maps(x)
        return x.unsqueeze(-2) if self.kind == "conv1d" else x

    def outputs_as_maps(self, y: Tensor) -> Tensor:
        """Outputs of the stock layer as :meth:`apply` makes them."""
        if self.stock is not None:
            return self.stock.output_maps(y)
        return y.unsqueeze(-2) if self.kind == "conv1d" else y

    def as_stock(self, y: Tensor) -> Tensor:
        """The other way round."""
        if self.stock is not None:
            return self.stock.stock_outputs(y)
        return y.squeeze(-2) if self.kind == "conv1d" else y

    @property
    def depthwise(self) -> bool:
        return self.convolves and self.groups > 1 and self.in_channels == self.groups

    @property
    def features(self) -> int:
        """Length N of one flattened filter: I/groups * depth * h * w."""
        return self.in_channels // self.groups * self.depth * self.kernel_size[0] * self.kernel_size[1]

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Sequence[int] | None = None) -> Tensor:
        """What the stock layer makes of its own input, with a weight that went through :meth:`native`; ``output_size`` as of
        :meth:`StockAxes.run`."""
        if self.kind == "conv2d" and not self.same_pad and self.padding_mode == "zeros":
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.stock is not None:
            return self.stock.run(x, weight, bias, self.groups, output_size)
        return self.as_stock(self.apply(self.as_maps(x), weight, bias))

    def native(self, weight: Tensor) -> Tensor:
        """A weight (O, I/groups * depth, h, w) as :meth:`run` takes it."""
        return weight if self.stock is None else self.stock.stock_weight(weight, self.groups)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Runs the layer on ``x`` (:meth:`as_maps`) with any ``weight`` (O', I/groups, h, w); O' may differ from the form's O."""
        if self.kind == "linear":
            return F.linear(x, weight.flatten(1), bias)
        if x.ndim > 4:  # volumes: maps side by side
            return self.apply(x.flatten(0, -4), weight, bias).unflatten(0, x.shape[:-3])
        padding: tuple[int, int] | str = self.padding
        if self.same_pad:
            x, padding = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), (0, 0)
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border(), mode=self.padding_mode), (0, 0)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _border(self) -> list[int]:
        """Padding amounts (left, right, top, bottom) for the non-zero padding modes."""
        if self.padding == "valid":
            return [0, 0, 0, 0]
        border: list[int] = []
        for axis in (1, 0):
            if self.padding == "same":
                total = self.dilation[axis] * (self.kernel_size[axis] - 1)
                border += [total // 2, total - total // 2]
            else:
                border += [int(self.padding[axis])] * 2
        return border

    def border(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Zero or mode padding (left, right, top, bottom) that an input map of this size gets."""
        if self.same_pad:
            amounts: list[int] = []
            for axis, size in ((1, width), (0, height)):
                span = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
                total = max((-(-size // self.stride[axis]) - 1) * self.stride[axis] + span - size, 0)
                amounts += [total // 2, total - total // 2]
            return amounts[0], amounts[1], amounts[2], amounts[3]
        left, right, top, bottom = self._border()
        return left, right, top, bottom

    def standardized(self, weight: Tensor, gain: Tensor | None) -> Tensor:
        """The weight that the convolution really uses: zero mean and unit variance a filter, times scale and gain."""
        if self.standardize is None:
            return weight
        eps, scale = self.standardize
        flat = weight.reshape(1, self.out_channels, -1)
        factor = None if gain is None else (gain * scale).reshape(-1)
        if gain is None and scale != 1.0:
            factor = torch.full((self.out_channels,), scale, dtype=weight.dtype, device=weight.device)
        flat = F.batch_norm(flat, None, None, weight=factor, training=True, momentum=0.0, eps=eps)
        return flat.reshape(weight.shape)

    def dense(self, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> nn.Module:
        """The stock module of this form with these tensors."""
        with torch.device("meta"):
            module = self._empty(bias is not None, gain is not None)
        # Products come out in any order of axes, and a convolution puts such a weight in order at every run.
        own = self.native(weight.detach()).reshape(self.stock_shape).clone(memory_format=torch.contiguous_format)
        module.weight = nn.Parameter(own)  # type: ignore[assignment]
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone())  # type: ignore[assignment]
        if gain is not None:
            module.gain = nn.Parameter(gain.detach().clone())  # type: ignore[assignment]
        return module

    def _empty(self, bias: bool, gain: bool) -> nn.Module:
        if self.stock is not None:
            return self.stock.module(self.in_channels, self.out_channels, self.groups, bias)
        if self.kind == "linear":
            return nn.Linear(self.in_channels, self.out_channels, bias=bias)
        if self.kind == "conv1d":
            line: Any = nn.Conv1d
            along = self.padding if isinstance(self.padding, str) else self.padding[1]
            return line(
                self.in_channels, self.out_channels, self.kernel_size[1], self.stride[1], along, self.dilation[1], self.groups,
                bias, self.padding_mode,
            )  # fmt: skip
        if self.standardize is not None:
            names: dict[str, Any] = {cls.__name__: cls for cls in _STANDARDIZED}
            module: nn.Conv2d = names[self.module_class](
                self.in_channels, self.out_channels, self.kernel_size, stride=self.stride, padding=0,
                dilation=self.dilation, groups=self.groups, bias=bias, eps=self.standardize[0],
            )  # fmt: skip
            module.padding = self.padding  # type: ignore[assignment]
            if gain:
                module.scale = self.standardize[1]  # type: ignore[assignment]
            if hasattr(module, "same_pad"):
                module.same_pad = self.same_pad  # type: ignore[assignment]
            return module
        cls: Any = Conv2dSame if self.same_pad else nn.Conv2d
        padding = 0 if self.same_pad else self.padding
        return cls(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, padding, self.dilation,
            self.groups, bias, **({} if self.same_pad else {"padding_mode": self.padding_mode}),
        )  # fmt: skip


def form_of(module: nn.Module) -> ConvForm | None:
    """The form of a dense layer, or None when a shared layer cannot stand in for it."""
    if any(getattr(type(module), name) is not getattr(nn.Module, name) for name in _CALLED):
        return None
    if isinstance(module, nn.Linear):
        if type(module).forward not in (nn.Linear.forward, TimmLinear.forward):
            return None
        return ConvForm("linear", module.in_features, module.out_features, module_class=type(module).__name__)
    if isinstance(module, nn.Conv1d):
        kind = type(module)
        if kind.forward is not nn.Conv1d.forward or kind._conv_forward is not nn.Conv1d._conv_forward:
            return None
        along = module.padding if isinstance(module.padding, str) else (0, int(module.padding[0]))
        return ConvForm(
            "conv1d", module.in_channels, module.out_channels, (1, int(module.kernel_size[0])), (1, int(module.stride[0])), along,
            (1, int(module.dilation[0])), module.groups, module.padding_mode, module_class=kind.__name__,
        )  # fmt: skip
    if (stock := axes_of(module)) is not None:
        layer: Any = module
        height, width = (1, *stock.kernel_size)[-2:]
        steps = (1, 1) if stock.transposed else _pair((1, *stock.stride)[-2:])
        return ConvForm(
            f"conv{'_transpose' * stock.transposed}{stock.rank}d", layer.in_channels, layer.out_channels, (height, width), steps,
            dilation=_pair((1, *stock.dilation)[-2:]), groups=layer.groups, module_class=type(module).__name__, stock=stock,
        )  # fmt: skip
    if not isinstance(module, nn.Conv2d):
        return None
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return None  # weight standardisation, masks, fake quantisation
    padding = module.padding if isinstance(module.padding, str) else (int(module.padding[0]), int(module.padding[1]))
    form = ConvForm(
        "conv2d", module.in_channels, module.out_channels, _pair(module.kernel_size), _pair(module.stride), padding,
        _pair(module.dilation), module.groups, module.padding_mode, module_class=type(module).__name__,
    )  # fmt: skip
    if isinstance(module, _STANDARDIZED):
        scale = float(getattr(module, "scale", 1.0))
        same = bool(getattr(module, "same_pad", False))
        return replace(form, standardize=(float(module.eps), scale), same_pad=same)
    if type(module).forward is nn.Conv2d.forward:
        return form
    if isinstance(module, Conv2dSame):
        return replace(form, same_pad=True)
    return None


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def target_weight(layer: nn.Module, form: ConvForm) -> Tensor:
    """(O, N) weight that the layer convolves with, before a learned gain."""
    weight = layer.weight.detach()  # type: ignore[union-attr,operator]
    if form.standardize is not None:
        weight = form.standardized(weight, None)
    return matrix_of(weight, form)  # type: ignore[arg-type]


def matrix_of(weight: Tensor, form: ConvForm) -> Tensor:
    """(O, N) of a stock layer's weight: one flattened filter a row."""
    if form.stock is not None:
        return form.stock.weight_of(weight, form.groups)
    return weight.reshape(form.out_channels, -1)
