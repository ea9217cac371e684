"""All tensors of a network as one block of bytes.

The reader builds the structure first, so names, shapes and types are known to it and only values need bytes; the
header of a safetensors entry alone would take about 100 bytes a tensor. Layout: a head, a zlib stream with what is
irregular (kinds, scales, classes), the packed codes and halves, then the entropy-coded integers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.grid import pack, unpack
from sharefold.store import rans
from sharefold.store.byte_reader import ByteReader, damaged
from sharefold.store.tensor_spec import KINDS, StoreSpec, TensorSpec, rows_of

NAME = "blob"
_HEAD = struct.Struct("<BIIII")  # format, checksum of the rest, bytes of side, of plain, largest coded integer
# The layout: 3 has vectors among what is entropy-coded, a row each (2 are exact tensors, in `exact.py`).
_FIRST, _VECTORS = 1, 3

# Those that torch can compare and subtract, and the widest range of values that :func:`pack` takes.
_INTEGERS, _MOST_BITS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), 16


def encode_blob(tensors: Mapping[str, Tensor], spec: StoreSpec) -> Tensor:
    """``tensors`` in their order as uint8 (bytes,).

    Raises:
        SharefoldError: a tensor is not on its grid.
    """
    parts = _parts(tensors, spec)
    stream = rans.encode(parts.codes, parts.classes, parts.largest)
    squeezed = zlib.compress(parts.side, 9)
    rest = squeezed + parts.plain + stream
    vectors = any(entry.kind == "coded" and tensors[name].dim() == 1 for name, entry in spec.tensors.items() if name in tensors)
    head = _HEAD.pack(_VECTORS if vectors else _FIRST, zlib.crc32(rest), len(squeezed), len(parts.plain), parts.largest)
    return torch.frombuffer(bytearray(head + rest), dtype=torch.uint8)


def blob_bytes(tensors: Mapping[str, Tensor], spec: StoreSpec) -> int:
    """About how many bytes :func:`encode_blob` gives, without coding them."""
    parts = _parts(tensors, spec)
    stream = rans.encoded_bytes(parts.codes, parts.classes, parts.largest)
    return _HEAD.size + len(zlib.compress(parts.side, 9)) + len(parts.plain) + stream


@dataclass(frozen=True)
class _Parts:
    """What a blob is made of; ``codes`` and ``classes`` (n,) are those of all entropy-coded tensors."""

    side: bytes
    plain: bytes
    codes: np.ndarray
    classes: np.ndarray
    largest: int


def _parts(tensors: Mapping[str, Tensor], spec: StoreSpec) -> _Parts:
    side, plain = bytearray(), bytearray()
    coded: list[np.ndarray] = []
    for name, given in tensors.items():
        tensor = given.float() if given.is_floating_point() and given.dtype != torch.float64 else given
        entry = spec.tensors.get(name) or TensorSpec(_plain_kind(tensor))
        if entry.kind == "fp16":
            entry = TensorSpec("fill" if _fills(tensor) else "fp16" if _is_exact(tensor) else "raw")
        side.append(KINDS.index(entry.kind))
        if entry.kind == "raw":
            plain += _bytes_of(tensor)
        elif entry.kind == "fp16":
            plain += _bytes_of(tensor.half())
        elif entry.kind == "fill":
            side += _bytes_of(tensor.flatten()[:1])
        elif entry.kind == "int":
            low = int(tensor.min())
            bits = max(1, (int(tensor.max()) - low).bit_length())
            side += struct.pack("<qB", low, bits)
            plain += bytes(pack(tensor.long() - low, bits).tolist())
        else:
            _encode_matrix(name, given, entry, side, plain, coded)
    largest = max([1] + [int(np.abs(codes).max()) for codes in coded if codes.size])
    nothing = np.zeros(0, dtype=np.int64)
    classes = [nothing]
    for codes in coded:
        rows, columns = rans.best_classes(codes, largest)
        side += _class_bytes(rows, columns)
        classes.append(rans.element_classes(rows, columns).ravel())
    flat = np.concatenate([nothing, *(codes.ravel() for codes in coded)])
    return _Parts(bytes(side), bytes(plain), flat, np.concatenate(classes), largest)


def _type_of(like: Tensor) -> torch.dtype:
    """The type in which blobs hold tensors such as ``like``."""
    return torch.float32 if like.is_floating_point() and like.dtype != torch.float64 else like.dtype


def decode_blob(blob: Tensor, template: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], StoreSpec]:
    """Tensors with the names, shapes and types of ``template``, and how they were stored.

    Raises:
        SharefoldError: damaged, truncated, of a newer format, or of another structure.
    """
    data = bytes(blob.numpy())
    if len(data) < _HEAD.size:
        raise damaged()
    form, checksum, side_size, plain_size, largest = _HEAD.unpack_from(data)
    if form > _VECTORS:
        raise SharefoldError(f"store: packed weights of format {form}, this sharefold reads up to {_VECTORS}: upgrade it")
    rest = data[_HEAD.size :]
    if zlib.crc32(rest) != checksum or side_size + plain_size > len(rest) or largest > rans.LARGEST:
        raise damaged()
    side = _Reader(memoryview(_unzipped(rest[:side_size], sum(map(_most_side_bytes, template.values())))))
    plain = _Reader(memoryview(rest)[side_size : side_size + plain_size])
    found: dict[str, Tensor] = {}
    specs: dict[str, TensorSpec] = {}
    waiting: list[tuple[str, Tensor, TensorSpec]] = []
    for name, like in template.items():
        kind = side.number("B")
        if kind >= len(KINDS):
            raise damaged()
        entry = TensorSpec(KINDS[kind])
        if entry.kind == "raw":
            found[name] = plain.tensor(_type_of(like), like.numel()).reshape(like.shape).to(like.dtype)
        elif entry.kind == "fp16":
            found[name] = plain.tensor(torch.float16, like.numel()).reshape(like.shape).to(like.dtype)
        elif entry.kind == "fill":
            value = side.tensor(_type_of(like), 1)
            found[name] = value.expand(like.numel()).reshape(like.shape).to(like.dtype, copy=True)
            if _fills(found[name]) and like.is_floating_point() and _is_exact(value):
                specs[name] = TensorSpec("fp16")  # as it was rounded
        elif entry.kind == "int":
            low, bits = side.number("q"), side.number("B")
            codes = plain.codes(bits, like.numel())
            found[name] = (codes + low).reshape(like.shape).to(like.dtype)
        else:
            _decode_matrix(name, like, entry, side, plain, found, waiting)
        if entry.kind not in ("raw", "int", "fill"):
            specs[name] = entry
    _decode_coded(waiting, rest[side_size + plain_size :], side, largest, found)
    if not side.done or not plain.done:
        raise SharefoldError("store: the packed weights belong to another structure than the plan says")
    return {name: found[name] for name in template}, StoreSpec(specs)


def _encode_matrix(
    name: str, tensor: Tensor, entry: TensorSpec, side: bytearray, plain: bytearray,
    coded: list[np.ndarray],
) -> None:  # fmt: skip
    matrix = tensor.detach().float().reshape(len(entry.scales), -1)
    codes = entry.codes(matrix)
    if not bool((entry.values(codes).to(tensor.dtype) == matrix.to(tensor.dtype)).all()):
        raise SharefoldError(f"store: tensor {name!r} changed since it was rounded: run quantize_ again")
    side += struct.pack("<f", entry.top) + bytes(entry.scales)
    if entry.kind == "coded":
        coded.append(codes.numpy())
        return
    side.append(entry.bits)
    if entry.kind == "codebook":
        side += struct.pack("<H", len(entry.levels)) + _bytes_of(torch.tensor(entry.levels, dtype=torch.float16))
        plain += bytes(pack(codes, entry.bits).tolist())
    else:
        plain += bytes(pack(codes + entry.limit, entry.bits).tolist())


def _decode_matrix(
    name: str, like: Tensor, entry: TensorSpec, side: _Reader, plain: _Reader, found: dict[str, Tensor],
    waiting: list[tuple[str, Tensor, TensorSpec]],
) -> None:  # fmt: skip
    if like.dim() == 0:
        raise damaged()
    entry.top = side.number("f")
    rows = rows_of(like)
    entry.scales = list(side.take(rows))
    if entry.kind == "coded":
        waiting.append((name, like, entry))
        return
    entry.bits = side.number("B")
    if not 2 <= entry.bits <= 8:
        raise damaged()
    if entry.kind == "codebook":
        entry.levels = side.tensor(torch.float16, side.number("H")).float().tolist()
    codes = plain.codes(entry.bits, like.numel())
    if entry.kind == "grid":
        codes = codes - entry.limit
    elif codes.numel() and int(codes.max()) >= len(entry.levels):
        raise damaged()
    found[name] = entry.values(codes.reshape(rows, -1)).reshape(like.shape).to(like.dtype)


def _decode_coded(
    waiting: list[tuple[str, Tensor, TensorSpec]], stream: bytes, side: _Reader, largest: int, found: dict[str, Tensor]
) -> None:
    classes = []
    for _, like, _ in waiting:
        rows, columns = _read_classes(side, rows_of(like), like.numel() // rows_of(like))
        classes.append(rans.element_classes(rows, columns).ravel())
    if not waiting:
        if stream:
            raise damaged()
        return
    codes = torch.from_numpy(rans.decode(stream, np.concatenate(classes), largest))
    for (name, like, entry), part in zip(waiting, codes.split([like.numel() for _, like, _ in waiting]), strict=True):
        found[name] = entry.values(part.reshape(rows_of(like), -1)).reshape(like.shape).to(like.dtype)


def _most_side_bytes(like: Tensor) -> int:
    """What a tensor has in the side stream at most: scales, classes of rows and columns, levels of a codebook, and a head."""
    rows = rows_of(like)
    return 1024 + 2 * rows + like.numel() // max(rows, 1)


def _unzipped(data: bytes, most: int) -> bytes:
    try:
        unzip = zlib.decompressobj()
        found = unzip.decompress(data, most + 1)
    except zlib.error:
        raise damaged() from None
    if len(found) > most or not unzip.eof:
        raise damaged()
    return found


def _class_bytes(rows: np.ndarray, columns: np.ndarray) -> bytes:
    shared, flat = bool((rows == rows[0]).all()), not columns.any()
    text = bytes([shared + 2 * flat]) + (bytes([int(rows[0])]) if shared else rows.astype(np.uint8).tobytes())
    return text if flat else text + (columns + 8).astype(np.uint8).tobytes()


def _read_classes(side: _Reader, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    flags = side.number("B")
    found = np.frombuffer(side.take(1 if flags & 1 else rows), np.uint8).astype(np.int64)
    offsets = np.zeros(columns, np.int64)
    if not flags & 2:
        offsets = np.frombuffer(side.take(columns), np.uint8).astype(np.int64) - 8
    return (np.repeat(found, rows) if flags & 1 else found), offsets


class _Reader(ByteReader):
    """Takes numbers, tensors and codes off the front of some bytes."""

    def number(self, form: str) -> int:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def tensor(self, dtype: torch.dtype, count: int) -> Tensor:
        size = torch.empty((), dtype=dtype).element_size()
        data = bytearray(self.take(size * count))
        return torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)

    def codes(self, bits: int, count: int) -> Tensor:
        data = bytearray(self.take((bits * count + 7) // 8))
        return unpack(torch.frombuffer(data, dtype=torch.uint8), bits, count) if count else torch.empty(0).long()


def _plain_kind(tensor: Tensor) -> str:
    if not tensor.numel():
        return "raw"
    if _is_constant(tensor):
        return "fill"
    if tensor.dtype in _INTEGERS and int(tensor.max()) - int(tensor.min()) < 1 << _MOST_BITS:
        return "int"
    return "raw"


def _is_constant(tensor: Tensor) -> bool:
    entries = tensor.detach().contiguous().reshape(-1, 1).view(torch.uint8)
    return bool((entries == entries[0]).all())


def _fills(tensor: Tensor) -> bool:
    """Whether halves are all the same, and one number of four bytes takes less."""
    return tensor.numel() > 2 and _is_constant(tensor)


def _is_exact(tensor: Tensor) -> bool:
    return bool((tensor.half().to(tensor.dtype) == tensor).all())


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
