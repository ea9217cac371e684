"""A composed weight in the type and the order in memory in which a convolution takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sharefold.layers.weight_cache import channels_last, symbolic


def rounded_once(x: Tensor, make: Callable[[], tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """A weight and a bias as ``make`` makes them; under autocast in full precision, the weight rounded at the end.

    The factors are small: rounding each of them, and each of their gradients, takes longer than the products do. A weight that
    stands in the order of the images' channels is not put in order again by the convolution.
    """
    if symbolic(x) or (dtype := autocast_dtype(kind := x.device.type)) is None:
        return make()
    with torch.autocast(kind, enabled=False):
        weight, bias = make()
    if torch.float64 in (weight.dtype, x.dtype):  # which autocast leaves alone
        return weight, bias
    last = weight.ndim == 4 and channels_last(x)
    layout = torch.channels_last if last else torch.preserve_format
    return weight.to(dtype, memory_format=layout), bias


def in_order_of(x: Tensor, weight: Tensor) -> Tensor:
    """A weight as a convolution of ``x`` takes it without putting it in order again, once a run, which is slow for small maps."""
    if symbolic(x) or weight.ndim != 4 or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return weight
    return weight.contiguous(memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The type that autocast computes in on devices of this kind, None where it is off."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None
