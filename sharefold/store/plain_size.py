"""How many bytes a safetensors file takes, by names, types and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_ALIGNED = 8  # bytes that the header is a multiple of
# As the header calls them. The file has them in this order, and those of one type by name.
_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {kind: place for place, kind in enumerate(_NAMES)}


def plain_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that ``safetensors.torch.save_file`` writes for ``tensors``, which need no memory."""
    return _file_bytes(((name, tensor.dtype, list(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()), metadata)


def dense_bytes(tensors: Mapping[str, Tensor], floats: torch.dtype | None = None) -> int:
    """As :func:`plain_bytes`; where floating tensors would be of another type, as if they were ``floats``."""
    return plain_bytes({
        name: tensor.to("meta", floats if floats is not None and tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    })  # fmt: skip


def _file_bytes(entries: Iterable[tuple[str, torch.dtype, list[int], int]], metadata: Mapping[str, str] | None) -> int:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, kind, shape, size in sorted(entries, key=lambda entry: (_ORDER.get(entry[1], 0), entry[0])):
        header[name] = {"dtype": _NAMES.get(kind, "F32"), "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    return 8 + -(-len(text) // _ALIGNED) * _ALIGNED + end
