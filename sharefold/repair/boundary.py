"""Values at one place of two networks for all images: in memory, in half precision, or in a temporary file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

Values = dict[fx.Node, Any]  # of one network and one batch

# A boundary may be so many times larger on disk than in memory.
DISK_FACTOR = 8


def elements(value: Any) -> int:
    """Numbers in all tensors of a value."""
    total = 0

    def count(leaf: Any) -> Any:
        nonlocal total
        if isinstance(leaf, Tensor):
            total += leaf.numel()
        return leaf

    fx.node.map_aggregate(value, count)
    return total


class Shelf:
    """Puts values of batches away and gives copies back, in the types that they had.

    Args:
        half: floats are kept in half precision: activations behind norms and ReLUs are far inside of its range, and what rounding
            adds to them is a thousandth of what any conversion does.
        file_bytes: with more than 0, in a temporary file of so many bytes, which goes when the shelf does.
    """

    def __init__(self, half: bool, file_bytes: int = 0) -> None:
        self.half = half
        self._values: dict[int, Values] = {}
        self._free = 0
        self._map: np.memmap | None = None
        if file_bytes:
            self._file = tempfile.TemporaryFile(prefix="sharefold-")  # noqa: SIM115  (lives as long as the shelf)
            self._map = np.memmap(self._file, np.uint8, "w+", shape=(file_bytes,))

    def put(self, key: int, values: Values) -> None:
        self._values[key] = {node: fx.node.map_aggregate(value, self._away) for node, value in values.items()}

    def get(self, key: int) -> Values:
        """Fresh copies: networks write into their values."""
        return {node: fx.node.map_aggregate(value, _back) for node, value in self._values[key].items()}

    def drop(self, key: int) -> None:
        del self._values[key]

    def _away(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        small = self.half and leaf.dtype == torch.float32 and float(leaf.detach().abs().amax() if leaf.numel() else 0) < 6e4
        kept = leaf.detach().to(torch.float16) if small else leaf.detach().clone()
        return _Kept(self._on_disk(kept) if self._map is not None else kept, leaf.dtype, leaf.device)

    def _on_disk(self, tensor: Tensor) -> Tensor:
        assert self._map is not None
        if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
            return self._placed(tensor.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # in the order that it is computed in
        return self._placed(tensor)

    def _placed(self, tensor: Tensor) -> Tensor:
        assert self._map is not None
        flat = tensor.cpu().contiguous()
        size = flat.numel() * flat.element_size()
        start = -(-self._free // 16) * 16
        if start + size > len(self._map):
            return flat
        self._free = start + size
        place = torch.from_numpy(self._map[start : start + size]).view(flat.dtype).view(flat.shape)
        place.copy_(flat)
        return place


class _Kept:
    def __init__(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.tensor, self.dtype, self.device = tensor, dtype, device


def _back(leaf: Any) -> Any:
    return leaf.tensor.to(leaf.device, leaf.dtype, copy=True) if isinstance(leaf, _Kept) else leaf


def shelf_for(count: int, images: int, memory: int) -> tuple[Callable[[], Shelf] | None, int]:
    """How ``count`` numbers an image of each network are put away within ``memory`` bytes; None where even a file would not do.

    Returns:
        (what makes the shelf, bytes in memory).
    """
    size = 2 * images * count  # two networks
    if 4 * size <= memory:
        return (lambda: Shelf(half=False)), 4 * size
    if 2 * size <= memory:
        return (lambda: Shelf(half=True)), 2 * size
    if 2 * size <= DISK_FACTOR * memory and 4 * size < shutil.disk_usage(tempfile.gettempdir()).free:
        return (lambda: Shelf(half=True, file_bytes=2 * size + (1 << 20))), 0
    return None, 0
