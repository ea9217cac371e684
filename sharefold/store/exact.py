"""All tensors of a network bit for bit in few bytes: what their numbers have in common is said once, and nothing is rounded.

The reader builds the structure first, so names and shapes are known to it. Layout: :data:`EXACT_FORMAT`, the length of a deflated
stream with a type and a kind for every tensor, that stream, packed integers, then for each type its numbers in chunks. A chunk is
split into the first bytes of its numbers, the second ones and so on (as HDF5's shuffle filter does); floats have their sign moved
behind the mantissa before, so that one byte is the exponent, of which weights have few. A plane of bytes is deflated where that
makes it smaller.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.grid import pack, unpack
from sharefold.store.byte_reader import ByteReader, damaged, inflated, number_bytes
from sharefold.untrusted import most_inflated

EXACT_FORMAT = 2
# By place in the file: an order that never changes.
_TYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip
_RAW, _FILL, _INT = range(3)
_KIND = 32  # a tensor's byte is its kind times this, plus the place of its type
_INTEGERS, _MOST_BITS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), 16
_MOST_PACKED = 1 << 14  # integers of one tensor: unpacking takes up to a hundred bytes each
_CHUNK = 1 << 18  # numbers
_MOST_SIDE = 24  # bytes of one tensor in the stream of types and kinds
_STORED, _DEFLATED = range(2)
_FAST, _SAMPLE = 1 << 15, 1 << 12  # bytes beyond which a plane is deflated with less care, by four or five parts of so many


def can_hold(tensors: Mapping[str, Tensor]) -> bool:
    """Whether :func:`encode_exact` knows the types of all ``tensors``."""
    return all(tensor.dtype in _TYPES for tensor in tensors.values())


def encode_exact(tensors: Mapping[str, Tensor]) -> bytes:
    """``tensors`` (on the CPU, contiguous) in their order."""
    side, packed = bytearray(), bytearray()
    streams: dict[int, list[Tensor]] = {}
    for tensor in tensors.values():
        place, kind = _TYPES.index(tensor.dtype), _kind(tensor)
        side.append(kind * _KIND + place)
        if kind == _FILL:
            side += _bytes(tensor)[: tensor.element_size()].tobytes()
        elif kind == _INT:
            low = int(tensor.min())
            bits = max(1, (int(tensor.max()) - low).bit_length())
            side += number_bytes(2 * low if low >= 0 else -2 * low - 1) + bytes([bits])
            packed += pack(tensor.long() - low, bits).numpy().tobytes()
        else:
            streams.setdefault(place, []).append(tensor)
    squeezed = _squeezed(bytes(side), 9, zlib.Z_DEFAULT_STRATEGY)
    parts = [bytes([EXACT_FORMAT]), number_bytes(len(squeezed)), squeezed, bytes(packed)]
    for place in sorted(streams):
        parts += [_coded(chunk, _TYPES[place]) for chunk in _chunks(streams[place], _word(_TYPES[place]))]
    return b"".join(parts)


def decode_exact(data: memoryview, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the names and shapes of ``template``, in the types that they were saved in.

    Takes the memory of the result and a few megabytes.

    Raises:
        SharefoldError: damaged, truncated, of a newer format, of another structure, or far larger than ``data`` explains.
    """
    reader = ByteReader(data)
    if reader.take(1)[0] != EXACT_FORMAT:
        raise damaged()
    side = ByteReader(memoryview(inflated(reader.take(reader.varint()), _MOST_SIDE * len(template))))
    found: dict[str, Tensor] = {}
    filled: list[tuple[Tensor, bytes]] = []
    streams: dict[int, list[Tensor]] = {}
    entries: list[tuple[str, int, int, bytes, int, int]] = []
    total = 0
    for name, like in template.items():
        kind, place = divmod(side.take(1)[0], _KIND)
        if kind > _INT or place >= len(_TYPES) or (kind != _RAW and not like.numel()):
            raise damaged()
        if kind == _INT and like.numel() > _MOST_PACKED:
            raise damaged()
        value = bytes(side.take(_TYPES[place].itemsize)) if kind == _FILL else b""
        low, bits = (side.varint(), side.take(1)[0]) if kind == _INT else (0, 0)
        if kind == _INT and not (1 <= bits <= _MOST_BITS and _TYPES[place] in _INTEGERS):
            raise damaged()
        entries.append((name, kind, place, value, low, bits))
        total += like.numel() * _TYPES[place].itemsize
    if not side.done:
        raise SharefoldError("store: the packed weights belong to another structure than the plan says")
    if total > most_inflated(len(data)):
        raise damaged()
    for name, kind, place, value, low, bits in entries:
        shape = template[name].shape
        if kind == _INT:
            count = shape.numel()
            codes = unpack(torch.frombuffer(bytearray(reader.take((bits * count + 7) // 8)), dtype=torch.uint8), bits, count)
            found[name] = _shifted(codes, low // 2 if low % 2 == 0 else -(low + 1) // 2, _TYPES[place]).reshape(shape)
            continue
        found[name] = torch.empty(shape, dtype=_TYPES[place])
        if kind == _FILL:
            filled.append((found[name], value))
        else:
            streams.setdefault(place, []).append(found[name])
    for tensor, value in filled:
        _words(tensor, 1).reshape(-1, len(value))[:] = np.frombuffer(value, np.uint8)
    for place in sorted(streams):
        for chunk in _places(streams[place], _word(_TYPES[place])):
            _read_chunk(reader, chunk, _TYPES[place])
    if not reader.done:
        raise SharefoldError("store: the packed weights belong to another structure than the plan says")
    return found


def _shifted(codes: Tensor, low: int, kind: torch.dtype) -> Tensor:
    """``codes + low`` in the type ``kind``, which must be able to hold them."""
    ends = torch.iinfo(kind)
    if not (ends.min <= low + int(codes.min()) and low + int(codes.max()) <= ends.max):
        raise damaged()
    return (codes + low).to(kind)


def _kind(tensor: Tensor) -> int:
    if not tensor.numel():
        return _RAW
    entries = _bytes(tensor).reshape(-1, tensor.element_size())
    if bool((entries == entries[0]).all()):
        return _FILL
    small = tensor.dtype in _INTEGERS and tensor.numel() <= _MOST_PACKED
    return _INT if small and int(tensor.max()) - int(tensor.min()) < 1 << _MOST_BITS else _RAW


def _word(kind: torch.dtype) -> int:
    """Bytes of what is split into planes: a number, or one of the two parts of a complex one."""
    return kind.itemsize // 2 if kind.is_complex else kind.itemsize


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes (n,) of a contiguous tensor, in its own memory."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


def _words(tensor: Tensor, size: int) -> np.ndarray:
    """The numbers (n,) of a contiguous tensor as unsigned integers of ``size`` bytes, in its own memory."""
    return _bytes(tensor).view(f"<u{size}")


def _places(tensors: list[Tensor], size: int) -> Iterator[list[np.ndarray]]:
    """Pieces of the memory of ``tensors``, one after the other, so many that they hold a chunk of numbers."""
    pieces: list[np.ndarray] = []
    room = _CHUNK
    for tensor in tensors:
        words, at = _words(tensor, size) if tensor.numel() else np.zeros(0, f"<u{size}"), 0
        while at < words.size:
            piece = words[at : at + room]
            pieces.append(piece)
            at, room = at + piece.size, room - piece.size
            if not room:
                yield pieces
                pieces, room = [], _CHUNK
    if pieces:
        yield pieces


def _chunks(tensors: list[Tensor], size: int) -> Iterator[np.ndarray]:
    for pieces in _places(tensors, size):
        yield np.concatenate(pieces)


def _coded(words: np.ndarray, kind: torch.dtype) -> bytes:
    """One chunk (n,): for every plane of bytes, the highest last, how it is kept and what."""
    size = words.dtype.itemsize
    if _is_float(kind):
        one, rest = words.dtype.type(1), words.dtype.type(8 * size - 1)
        words = (words << one) | (words >> rest)
    planes = np.ascontiguousarray(words.view(np.uint8).reshape(-1, size).T)
    parts = []
    for plane in planes:
        text = plane.tobytes()
        squeezed = _deflate(text)
        length = number_bytes(len(squeezed))
        smaller = len(squeezed) + len(length) < len(text)
        parts.append(bytes([_DEFLATED]) + length + squeezed if smaller else bytes([_STORED]) + text)
    return b"".join(parts)


def _read_chunk(reader: ByteReader, pieces: list[np.ndarray], kind: torch.dtype) -> None:
    """The inverse of :func:`_coded`, into ``pieces``."""
    count, size = sum(piece.size for piece in pieces), pieces[0].dtype.itemsize
    planes = np.empty((count, size), np.uint8)
    for plane in range(size):
        how = reader.take(1)[0]
        if how > _DEFLATED:
            raise damaged()
        text = inflated(reader.take(reader.varint()), count) if how == _DEFLATED else reader.take(count)
        if len(text) != count:
            raise damaged()
        planes[:, plane] = np.frombuffer(text, np.uint8)
    words = planes.reshape(-1).view(f"<u{size}")
    if _is_float(kind):
        one, rest = words.dtype.type(1), words.dtype.type(8 * size - 1)
        words = (words >> one) | (words << rest)
    at = 0
    for piece in pieces:
        piece[:] = words[at : at + piece.size]
        at += piece.size


def _is_float(kind: torch.dtype) -> bool:
    return kind.is_floating_point or kind.is_complex


def _deflate(text: bytes) -> bytes:
    """The shorter of two ways: the exponents of weights repeat, but not in an order. Of much text, the way that is shorter for
    parts of it, and ``text`` itself where neither is."""
    strategies = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
    if len(text) <= _FAST:
        return min((_squeezed(text, 9, strategy) for strategy in strategies), key=len)
    sample = b"".join(text[at : at + _SAMPLE] for at in range(0, len(text), len(text) // 4))
    best = min(strategies, key=lambda strategy: len(_squeezed(sample, 6, strategy)))
    return _squeezed(text, 6, best) if len(_squeezed(sample, 6, best)) < len(sample) else text


def _squeezed(text: bytes, level: int, strategy: int) -> bytes:
    squeeze = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)
    return squeeze.compress(text) + squeeze.flush()
