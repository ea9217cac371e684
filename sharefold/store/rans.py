"""Entropy coding of small integers: range asymmetric numeral systems, many lanes at once.

Rounded weights are far from uniform, so a fixed number of bits a code wastes some. Each code is coded with a
discretised logistic distribution of one of :data:`CLASSES` widths; the caller says which. The coder is the 16-bit-word
form of Duda's rANS (arXiv:1311.2540); lanes are interleaved so that numpy codes one symbol of every lane a step.
"""

from __future__ import annotations

from decimal import Context, Decimal, localcontext
from functools import cache, lru_cache

import numpy as np

from sharefold.errors import SharefoldError

CLASSES = 24
_PRECISION = 15
_TOTAL = 1 << _PRECISION
_LOW = 1 << 16
_SYMBOLS_PER_LANE = 8192
# A code beyond this would need a frequency table larger than it is worth.
LARGEST = 2047
_CONTEXT = Context(prec=30)


@lru_cache(maxsize=8)
def frequencies(largest: int) -> np.ndarray:
    """Integer frequencies (CLASSES, 2 * largest + 1) of the codes -largest .. largest; every row adds up to 2^15.

    Class k is a logistic distribution of scale 2^(k/2 - 4). Decimal arithmetic rounds the same on every machine, as
    it must: a table that differs by one between writer and reader would make the file unreadable.
    """
    with localcontext(Context(prec=28)):  # whatever the caller has set
        return _frequencies(largest)


def _frequencies(largest: int) -> np.ndarray:
    rows = []
    spare = _TOTAL - (2 * largest + 1)  # one for each code, the rest by probability
    for k in range(CLASSES):
        counts = [int(spare * _probability(k, code)) + 1 for code in range(1, largest + 1)]
        center = _TOTAL - 2 * sum(counts)
        assert center > 0
        rows.append([*counts[::-1], center, *counts])
    return np.array(rows, dtype=np.int64)


@cache
def _probability(k: int, code: int) -> Decimal:
    """Of ``code`` in class k; there are at most CLASSES * LARGEST of them, and tables share them."""
    return _CONTEXT.subtract(_beyond(k, code), _beyond(k, code + 1))


def _beyond(k: int, code: int) -> Decimal:
    """P(c > code - 1/2) in class k."""
    return _CONTEXT.divide(Decimal(1), 1 + _CONTEXT.exp(_CONTEXT.divide(Decimal(code) - Decimal("0.5"), _scale(k))))


@cache
def _scale(k: int) -> Decimal:
    return _CONTEXT.power(Decimal(2), Decimal(k) / 2 - 4)


@lru_cache(maxsize=8)
def costs(largest: int) -> np.ndarray:
    """Bits (CLASSES, 2 * largest + 1) that a code of each class takes."""
    return _PRECISION - np.log2(frequencies(largest))


def lanes_of(count: int) -> int:
    """How many interleaved lanes ``count`` symbols are coded with."""
    return int(min(4096, max(4, count // _SYMBOLS_PER_LANE)))


def encode(codes: np.ndarray, classes: np.ndarray, largest: int) -> bytes:
    """Codes (n,) in -largest .. largest, with their classes (n,), as bytes; :func:`decode` is the inverse."""
    if codes.size == 0:
        return b""
    if int(np.abs(codes).max()) > largest:
        raise SharefoldError(f"store: a code is beyond {largest}: use larger steps")
    table = frequencies(largest)
    starts = np.cumsum(table, axis=1) - table
    width = lanes_of(codes.size)
    symbols = codes.astype(np.int64) + largest
    freq, start = table[classes, symbols].astype(np.uint64), starts[classes, symbols].astype(np.uint64)
    state = np.full(width, _LOW, dtype=np.uint64)
    words: list[np.ndarray] = []
    shift, bits = np.uint64(16), np.uint64(_PRECISION)
    for first in range((codes.size - 1) // width * width, -1, -width):
        f, s = freq[first : first + width], start[first : first + width]
        x = state[: f.size]
        full = x >= (f << np.uint64(32 - _PRECISION))
        words.append((x[full] & np.uint64(0xFFFF)).astype("<u2")[::-1])
        x = np.where(full, x >> shift, x)
        quotient = x // f
        state[: f.size] = (quotient << bits) + (x - quotient * f) + s
    stream = np.concatenate(words)[::-1]
    return state.astype("<u4").tobytes() + stream.tobytes()


def encoded_bytes(codes: np.ndarray, classes: np.ndarray, largest: int) -> int:
    """What :func:`encode` will take, to within a few bytes a lane, in a fraction of its time."""
    return int(4 * lanes_of(codes.size) + costs(largest)[classes, codes + largest].sum() / 8) if codes.size else 0


def decode(data: bytes, classes: np.ndarray, largest: int) -> np.ndarray:
    """The codes (n,) int64 of ``data``; ``classes`` (n,) as at encoding.

    Raises:
        SharefoldError: the bytes end too early, or do not decode to where coding began.
    """
    count = classes.size
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if not 0 <= largest <= LARGEST:
        raise SharefoldError(f"store: the largest code {largest} is out of range: the file is damaged")
    width = lanes_of(count)
    if len(data) < 4 * width or len(data) % 2:
        raise SharefoldError("store: the coded weights end too early: the file is damaged")
    table = frequencies(largest)
    starts = np.cumsum(table, axis=1) - table
    lookup = np.stack([np.repeat(np.arange(row.size), row) for row in table]).astype(np.int16)
    state = np.frombuffer(data, "<u4", width).astype(np.uint64)
    words = np.frombuffer(data, "<u2", offset=4 * width).astype(np.uint64)
    used = 0
    out = np.empty(count, dtype=np.int64)
    mask, bits, shift = np.uint64(_TOTAL - 1), np.uint64(_PRECISION), np.uint64(16)
    frequency, start = table.astype(np.uint64), starts.astype(np.uint64)
    for first in range(0, count, width):
        k = classes[first : first + width]
        x = state[: k.size]
        slot = x & mask
        symbol = lookup[k, slot.astype(np.int64)]
        out[first : first + k.size] = symbol
        x = frequency[k, symbol] * (x >> bits) + slot - start[k, symbol]
        short = np.flatnonzero(x < _LOW)
        if used + short.size > words.size:
            raise SharefoldError("store: the coded weights end too early: the file is damaged")
        x[short] = (x[short] << shift) | words[used : used + short.size]
        used += short.size
        state[: k.size] = x
    if used != words.size or not bool((state == _LOW).all()):
        raise SharefoldError("store: the coded weights do not add up: the file is damaged")
    return out - largest


def best_classes(codes: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Classes of the rows (O,) and offsets of the columns (N,), at least -8 and at most 7, of a code matrix (O, N).

    The class of an element is row class plus column offset, kept in range (:func:`element_classes`). Chosen by the
    bits they take, their own included: all rows may share one class, and all offsets may be 0.
    """
    table = costs(largest)
    symbols = codes.astype(np.int64) + largest
    zero = np.zeros(codes.shape[1], dtype=np.int64)
    per_row = np.stack([row[symbols].sum(1) for row in table])  # (CLASSES, O)
    one = np.full(codes.shape[0], int(per_row.sum(1).argmin()))
    candidates = [(one, zero, per_row.sum(1).min()), (per_row.argmin(0), zero, per_row.min(0).sum() + 4 * len(one))]
    for rows, _, cost in list(candidates):
        columns = zero
        for _ in range(2):
            trial = np.stack([
                np.take_along_axis(table[np.clip(rows + step, 0, CLASSES - 1)], symbols, 1).sum(0)
                for step in range(-8, 8)
            ])
            columns = trial.argmin(0) - 8
            if (rows == rows[0]).all():
                break
            trial = np.stack([
                table[np.clip(k + columns, 0, CLASSES - 1)[None, :], symbols].sum(1) for k in range(CLASSES)
            ])
            rows = trial.argmin(0)
        cost = table[element_classes(rows, columns), symbols].sum() + 4 * codes.shape[1]
        cost += 0 if (rows == rows[0]).all() else 4 * len(rows)
        candidates.append((rows, columns, cost))
    rows, columns, _ = min(candidates, key=lambda c: c[2])
    return rows, columns


def element_classes(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Class of every element (O, N) from row classes (O,) and column offsets (N,)."""
    return np.clip(rows[:, None] + columns[None, :], 0, CLASSES - 1)
