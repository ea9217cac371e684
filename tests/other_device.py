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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

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


class Made(TorchFunctionMode):
    """``torch.tensor(..., device="meta")`` leaves its values out, too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and "device" in kwargs:
            return torch.tensor(*args, **{k: v for k, v in kwargs.items() if k != "device"}).to(kwargs["device"])
        return func(*args, **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the values; its results are where CUDA would have them."""
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    asked = kwargs.get("device")
    if there and func not in MIXED and any(t.dim() and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device ({func}: {[tuple(t.shape) for t in tensors]})")
    if func is aten.index.Tensor and there and not isinstance(args[0], Elsewhere):
        raise RuntimeError("indices should be on the same device as the indexed tensor or on the CPU")
    elsewhere = bool(there) if asked is None else torch.device(asked).type == "meta"
    if func in (aten.copy_.default, aten.index_put_.default):
        elsewhere = isinstance(args[0], Elsewhere)
    if kwargs.get("generator") is not None and elsewhere:
        raise RuntimeError(f"Expected a generator of the tensor's device ({func})")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(t.values): t for t in there}
    inside = tree_map(lambda leaf: leaf.values if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
    result = func(*inside[0], **inside[1])

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not elsewhere:
            return leaf
        if leaf.dtype == torch.float64 and not OtherDevice.doubles:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        return known.get(id(leaf)) if id(leaf) in known else Elsewhere(leaf)

    return tree_map(placed, result)


@contextmanager
def other_device(doubles: bool = True) -> Iterator[torch.device]:
    """The device, for as long as it is there; without ``doubles`` one that has no float64."""
    real = torch.autocast
    autocast = patch("torch.autocast", lambda kind, **how: real("cpu" if kind == "meta" else kind, **how))
    # Wrapped tensors have no views in inference mode.
    inference = patch("torch.inference_mode", lambda mode=True: torch.set_grad_enabled(not mode and torch.is_grad_enabled()))
    with OtherDevice(), Made(), autocast, inference, patch.object(OtherDevice, "doubles", doubles):
        yield torch.device("meta")
