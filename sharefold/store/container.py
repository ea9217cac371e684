"""The file as one tensor: configuration, checksum and all tensors in one row of bytes.

A safetensors file says name, type, shape and place of every tensor, about 65 bytes each, and its metadata are text; where that is
a good part of the file, the whole content is the one tensor :data:`NAME` (uint8) instead, and there are no metadata. Layout: a
version, the CRC-32 of what follows, the length of the configuration, the configuration (:mod:`sharefold.store.short_config`), and
the tensors: exact (:mod:`sharefold.store.exact`) or rounded (:mod:`sharefold.store.blob`).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.store.byte_reader import ByteReader, damaged, number_bytes

NAME = "sharefold"
VERSION = 1
_SUM = 4  # bytes of the checksum


def packed(config: bytes, weights: bytes) -> Tensor:
    """(bytes,) uint8."""
    rest = number_bytes(len(config)) + config + weights
    head = bytes([VERSION]) + zlib.crc32(rest).to_bytes(_SUM, "little")
    return torch.frombuffer(bytearray(head + rest), dtype=torch.uint8)


def unpacked(content: Tensor, where: str) -> tuple[memoryview, Tensor]:
    """The two arguments of :func:`packed`, in the memory of ``content``.

    Raises:
        SharefoldError: not such a tensor, of a newer version, damaged or cut off.
    """
    if content.dim() != 1 or content.dtype != torch.uint8 or content.numel() <= 1 + _SUM:
        raise damaged()
    reader = ByteReader(content.numpy().data)
    version = reader.take(1)[0]
    if version > VERSION:
        raise SharefoldError(f"{where}: one tensor of version {version}, this sharefold reads up to {VERSION}: upgrade sharefold")
    if int.from_bytes(reader.take(_SUM), "little") != zlib.crc32(content.numpy().data[1 + _SUM :]):
        raise SharefoldError(f"{where} is damaged: its checksum does not hold: download or save it again")
    config = reader.take(reader.varint())
    return config, content[content.numel() - len(reader.rest()) :]
