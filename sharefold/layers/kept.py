"""Tensors that are made from others, and kept from run to run while those stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

Made = TypeVar("Made")


class Kept:
    """One such value; deep copies and pickles of it are empty."""

    def __init__(self) -> None:
        self._key: Any = None
        self._value: Any = None

    def get(self, x: Tensor | None, sources: Iterable[Tensor], make: Callable[[], Made]) -> Made:
        """What ``make`` makes of ``sources`` for an input ``x``; made anew without one, or where gradients, tracers or
        compilers look on."""
        if x is None or torch.is_grad_enabled() or _symbolic(x):
            return make()
        key = tuple((t.data_ptr(), t._version, t.dtype) for t in sources) + (
            torch.is_autocast_enabled(x.device.type),
            torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None,
        )
        if self._key != key:
            self._key, self._value = key, make()
        return self._value

    def clear(self) -> None:
        self._key = self._value = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def _symbolic(x: Tensor) -> bool:
    """Tracers and compilers must see the composition itself. On the meta device there are no values to keep."""
    return isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or x.is_meta
