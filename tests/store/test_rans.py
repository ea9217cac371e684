from __future__ import annotations

from decimal import Context, localcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharefold.errors import SharefoldError
from sharefold.store import rans


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 40), st.integers(0, 2**31))
def test_round_trip(count: int, largest: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    codes = generator.integers(-largest, largest + 1, count)
    classes = generator.integers(0, rans.CLASSES, count)
    assert (rans.decode(rans.encode(codes, classes, largest), classes, largest) == codes).all()


def test_frequencies_are_a_distribution_and_the_tables_are_fixed() -> None:
    table = rans.frequencies(9)
    assert (table.sum(1) == 2**15).all()
    assert (table > 0).all()
    assert (table == table[:, ::-1]).all()
    # Readers of old files need these numbers for ever.
    assert table[8].tolist()[9:13] == [8034, 6390, 3490, 1525]


def test_tables_do_not_depend_on_the_precision_of_the_caller() -> None:
    expected = rans.frequencies(11).copy()
    for table in (rans.frequencies, rans._probability):
        table.cache_clear()
    with localcontext(Context(prec=6)):
        found = rans.frequencies(11)
    assert (found == expected).all()


def test_length_is_near_the_entropy() -> None:
    generator = np.random.default_rng(0)
    codes = np.rint(generator.normal(size=(40, 500)) * np.exp(generator.normal(size=(40, 1)))).astype(np.int64)
    largest = int(np.abs(codes).max())
    rows, columns = rans.best_classes(codes, largest)
    classes = rans.element_classes(rows, columns).ravel()
    bits = 8 * len(rans.encode(codes.ravel(), classes, largest)) / codes.size
    entropy = 0.0
    for row in codes:
        share = np.unique(row, return_counts=True)[1] / row.size
        entropy -= (share * np.log2(share)).sum() / len(codes)
    assert entropy < bits + 0.05  # the plug-in entropy of 500 samples is a little low itself
    assert bits < entropy + 0.1


def test_classes_follow_rows_and_columns() -> None:
    generator = np.random.default_rng(1)
    codes = np.rint(generator.normal(size=(64, 64)) * np.array([1.0, 30.0])[np.arange(64) % 2]).astype(np.int64)
    rows, columns = rans.best_classes(codes, int(np.abs(codes).max()))
    assert columns[1::2].min() - columns[::2].max() >= 6
    rows, columns = rans.best_classes(codes.T.copy(), int(np.abs(codes).max()))
    assert rows[1::2].min() - rows[::2].max() >= 6
    assert not columns.any()


@pytest.mark.parametrize("count", [0, 1, 700, 60_000])
def test_the_length_is_known_before_coding(count: int) -> None:
    generator = np.random.default_rng(2)
    codes = np.rint(generator.normal(size=count) * 5).astype(np.int64)
    classes = generator.integers(10, 14, count)
    length = len(rans.encode(codes, classes, 40))
    assert abs(rans.encoded_bytes(codes, classes, 40) - length) <= 8 + 0.002 * length


@pytest.mark.parametrize("cut", [1, 2, 3, 40])
def test_cut_stream_is_refused(cut: int) -> None:
    codes = np.arange(-50, 50)
    classes = np.full(100, 12)
    data = rans.encode(codes, classes, 50)
    with pytest.raises(SharefoldError, match="damaged"):
        rans.decode(data[:-cut], classes, 50)
