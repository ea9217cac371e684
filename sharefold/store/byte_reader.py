"""Reading packed weights front to back: what runs out, or would unpack to more than it may, is damaged."""

from __future__ import annotations

import zlib

from sharefold.errors import SharefoldError

_MOST_DIGITS = 10  # bytes of a number: 70 bits


class ByteReader:
    """Takes values off the front of some bytes, without a copy."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> memoryview:
        if not 0 <= count <= len(self._data) - self._at:
            raise damaged()
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> memoryview:
        return self.take(len(self._data) - self._at)

    def varint(self) -> int:
        """A whole number from 0 of :func:`number_bytes`."""
        found = 0
        for place in range(_MOST_DIGITS):
            byte = self.take(1)[0]
            found |= (byte & 127) << (7 * place)
            if byte < 128:
                return found
        raise damaged()


def number_bytes(number: int) -> bytes:
    """A whole number from 0 in seven bits a byte, the lowest first; all bytes but the last have their highest bit set."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def inflated(data: memoryview, most: int, dictionary: bytes = b"") -> bytes:
    """What a bare deflate stream holds.

    Raises:
        SharefoldError: damaged, followed by something else, or more than ``most`` bytes, which are never made.
    """
    try:
        unzip = zlib.decompressobj(-15, zdict=dictionary) if dictionary else zlib.decompressobj(-15)
        found = unzip.decompress(data, most + 1)
    except zlib.error:
        raise damaged() from None
    if len(found) > most or not unzip.eof or unzip.unused_data:
        raise damaged()
    return found


def damaged() -> SharefoldError:
    return SharefoldError("store: the packed weights are damaged or cut off: download or save the file again")
