"""A second device on a machine that has none: tensors that say "meta", hold values all the same, and refuse to meet others.

A tensor left on the CPU beside a network on a GPU is an error that no CPU test can see. Inside of :func:`other_device`,
``model.to("meta")`` moves a network to a device that computes on the CPU, keeps CUDA's rules and breaks where CUDA would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# What may read from another device: copies, and indices.
MIXED = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class Elsewhere(Tensor):
    """Values of another device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        made.values = values
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.values})"

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def tolist(self) -> Any:
        return self.values.tolist()

    def __getitem__(self, index: Any) -> Any:
        # Of a list, torch makes an index tensor on "meta" by itself, and such ones have no values.
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """Takes every operation; ``doubles``: whether the device knows float64, as Apple's does not."""

    doubles = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch wraps the method above in something that takes longer than most operations.
        return False


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the values; its results are where CUDA would have them.

    Looks at every argument once and at lists one level deep, all that operators have: tens of thousands go through here.
    """
    there: list[Elsewhere] = []
    here: list[Tensor] = []

    def inside(value: Any) -> Any:
        kind = type(value)
        if kind is Elsewhere:
            there.append(value)
            return value.values
        if kind is list or kind is tuple:
            return kind(map(inside, value))
        if isinstance(value, Tensor) and value.dim():
            here.append(value)
        return value

    given = [inside(value) for value in args]
    options = {name: inside(value) for name, value in kwargs.items()} if kwargs else kwargs
    if there and here and func not in MIXED:
        raise RuntimeError(f"Expected all tensors to be on the same device ({func}: {[tuple(t.shape) for t in there + here]})")
    if func is aten.index.Tensor and there and type(args[0]) is not Elsewhere:
        raise RuntimeError("indices should be on the same device as the indexed tensor or on the CPU")
    elsewhere = bool(there)
    if options and options.get("device") is not None:
        elsewhere = torch.device(options["device"]).type == "meta"
        options["device"] = torch.device("cpu")
    if func in (aten.copy_.default, aten.index_put_.default):
        elsewhere = type(args[0]) is Elsewhere
    if elsewhere and options and options.get("generator") is not None:
        raise RuntimeError(f"Expected a generator of the tensor's device ({func})")
    result = func(*given, **options)

    def placed(value: Any) -> Any:
        kind = type(value)
        if kind is list or kind is tuple:
            return kind(map(placed, value))
        if not isinstance(value, Tensor):
            return value
        for known in there:
            if known.values is value:  # what was written into
                return known
        if value.dtype == torch.float64 and not OtherDevice.doubles:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return Elsewhere(value)

    return placed(result) if elsewhere else result


@contextmanager
def other_device(doubles: bool = True) -> Iterator[torch.device]:
    """The device, for as long as it is there; without ``doubles`` one that has no float64."""
    real = torch.autocast
    autocast = patch("torch.autocast", lambda kind, **how: real("cpu" if kind == "meta" else kind, **how))
    # That function leaves the values out, too.
    from_list = torch.tensor
    tensor = patch("torch.tensor", lambda data, device=None, **how: from_list(data, **how).to(device or "cpu"))
    # Wrapped tensors have no views in inference mode.
    inference = patch("torch.inference_mode", lambda mode=True: torch.set_grad_enabled(not mode and torch.is_grad_enabled()))
    with OtherDevice(), tensor, autocast, inference, patch.object(OtherDevice, "doubles", doubles):
        yield torch.device("meta")
