"""Arrays of ``.npz`` and ``.npy`` files, whose declared sizes are checked before anything is unpacked."""

from __future__ import annotations

import lzma
import math
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from sharefold.errors import SharefoldError
from sharefold.untrusted import first_line, is_int

# Images and signals compress a few times; what inflates further than this is neither.
_INFLATED, _FREE_BYTES = 100, 1 << 27
# What zip archives, and numpy's reading of a header as Python text, trip over.
_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, NotImplementedError, RuntimeError, TypeError, KeyError,
           IndexError, OverflowError, SyntaxError, tokenize.TokenError, MemoryError, lzma.LZMAError)  # fmt: skip


class NpzFile:
    """The names in the archive, and its arrays by name.

    Raises:
        SharefoldError: no zip archive. Also from :meth:`read`.
    """

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = {e.filename.removesuffix(".npy"): e for e in archive.infolist() if e.filename.endswith(".npy")}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise _unreadable(where, "npz file of plain arrays", error) from None

    def read(self, name: str) -> np.ndarray:
        """The array of plain numbers called ``name``."""
        entry = self.entries[name]
        if entry.file_size > _INFLATED * entry.compress_size + _FREE_BYTES:
            raise SharefoldError(
                f"{self.where}: {name} would inflate from {entry.compress_size:,} to {entry.file_size:,} bytes: no data"
            )
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(entry) as stream:
                return _array(stream, entry.file_size, name, self.where)
        except _DAMAGE as error:
            raise _unreadable(self.where, "npz file of plain arrays", error) from None


def read_npy(path: Path, where: str) -> np.ndarray:
    """The array of plain numbers in an ``.npy`` file.

    Raises:
        SharefoldError: damaged, or of Python objects.
    """
    try:
        with path.open("rb") as stream:
            return _array(stream, path.stat().st_size, "the array", where)
    except _DAMAGE as error:
        raise _unreadable(where, "npy file of a plain array", error) from None


def _array(stream: IO[bytes], size: int, name: str, where: str) -> np.ndarray:
    """What ``size`` bytes are, if their head says so."""
    shape, kind = _head(stream)
    if kind.hasobject:
        raise ValueError(f"{name} holds Python objects")
    if math.prod(shape) * kind.itemsize != size - stream.tell():
        raise SharefoldError(f"{where}: {name} claims to be {kind} of shape {shape}, which it is not: damaged")
    stream.seek(0)
    return npy.read_array(stream, allow_pickle=False)


def _unreadable(where: str, what: str, error: Exception) -> SharefoldError:
    return SharefoldError(f"{where}: not a readable {what} ({first_line(error)})")


def _head(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, kind = read(stream)
    if not all(is_int(side) and side >= 0 for side in shape):
        raise ValueError(f"a shape of {shape}")
    return shape, kind
