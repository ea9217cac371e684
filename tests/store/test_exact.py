"""Tensors packed bit for bit: what comes back, what it takes, what is refused."""

from __future__ import annotations

import random
import zlib

import pytest
import torch
from limits import within
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.store import exact
from sharefold.store.byte_reader import ByteReader, number_bytes
from sharefold.store.exact import can_hold, decode_exact, encode_exact

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def of_every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator)
    found = {str(kind): values.to(kind) for kind in FLOATS}
    for kind in INTEGERS:
        ends = torch.iinfo(kind)
        found[f"ends {kind}"] = torch.tensor([ends.min, ends.max, 3, ends.max - 1], dtype=kind)
        found[f"near the least {kind}"] = torch.tensor([ends.min, ends.min + 9], dtype=kind)
        found[f"near the largest {kind}"] = torch.tensor([ends.max, ends.max - 9], dtype=kind)
    bits = torch.tensor([0, -(1 << 31), 1, 0x7FC12345, 0x7F800000, -1], dtype=torch.int32)  # zeros, the least, NaN, infinity
    return {
        **found, "bits": bits.view(torch.float32), "complex": torch.randn(7, dtype=torch.complex64, generator=generator),
        "none": torch.empty(0, 3), "one": torch.tensor(1.5), "count": torch.tensor(7), "ones": torch.ones(3, 4),
        "yes": torch.tensor([True, False, True]), "matrix": torch.randn(6, 4, 3, 3, generator=generator),
        "pivots": torch.tensor([100, 3, 65]).int(), "codes": torch.randint(0, 16, (40, 1000), generator=generator).byte(),
    }  # fmt: skip


def like(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes; types that say nothing."""
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    bits = (one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


@pytest.mark.parametrize("chunk", [700, exact._CHUNK])
def test_every_bit_and_type_comes_back(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_CHUNK", chunk)
    tensors = of_every_kind()
    assert can_hold(tensors) and not can_hold({"x": torch.zeros(1, dtype=torch.complex128)})
    found = decode_exact(memoryview(encode_exact(tensors)), like(tensors))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name


def test_exponents_and_small_integers_take_what_they_hold() -> None:
    """Normal numbers: 2.6 bits of exponent instead of 8; what is constant or an index next to nothing."""
    weights = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    for kind, share in ((torch.float32, (24 + 2.9) / 32), (torch.bfloat16, (8 + 2.9) / 16)):
        assert len(encode_exact({"w": weights.to(kind)})) < share * weights.to(kind).nbytes
    assert len(encode_exact({"mean": torch.zeros(4096), "count": torch.tensor(1 << 40)})) < 40
    assert len(encode_exact({"pivots": torch.arange(1000, 1064).int()})) < 20 + 64 * 6 // 8
    assert len(encode_exact({"noise": torch.randint(0, 256, (9999,)).byte()})) < 9999 + 20


def test_a_file_of_today_is_read_tomorrow() -> None:
    """The bytes of format 2: types and kinds, packed integers, planes."""
    tensors = {"w": torch.tensor([1.0, -2.0, 3.5, 4.25]), "count": torch.tensor(20), "pivots": torch.tensor([5, 6, 7, 8]).int()}
    side = bytes([0, 32 + 4, *(20).to_bytes(8, "little"), 64 + 5, 10, 2])
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    deflated = squeeze.compress(side) + squeeze.flush()
    planes = b"".join(b"\x00" + bytes.fromhex(plane) for plane in ("00010000", "00000000", "0000c010", "7f808081"))
    built = bytes([2, len(deflated)]) + deflated + bytes([0b11100100]) + planes
    found = decode_exact(memoryview(built), like(tensors))
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name


def test_damage_is_refused_or_read_and_nothing_else() -> None:
    tensors = of_every_kind()
    template, data = like(tensors), encode_exact(tensors)
    refused = 0
    for number in range(250):
        draw = random.Random(number)
        damaged = bytearray(data)
        at = draw.randrange(len(data) if number % 2 else 200)
        if draw.random() < 0.3:
            del damaged[at:]
        elif draw.random() < 0.5:
            damaged[at:at] = draw.randbytes(3)
        else:
            damaged[at] ^= 1 << draw.randrange(8)
        try:
            decode_exact(memoryview(damaged), template)
        except SharefoldError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 150
    for other in ({**template, "more": torch.empty(2)}, {name: template[name] for name in list(template)[:-1]}):
        with pytest.raises(SharefoldError):
            decode_exact(memoryview(data), other)


def zeros(megabytes: int) -> bytes:
    squeeze = zlib.compressobj(1, zlib.DEFLATED, -15)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(megabytes)) + squeeze.flush()


def test_what_would_unpack_to_far_more_is_not_unpacked() -> None:
    bomb, empty = zeros(512), zlib.compress(b"\x00", 9)[2:-4]
    numbers = torch.empty(1000, device="meta")
    with within(kilobytes=50_000, seconds=5):
        for data in (bytes([2]) + number_bytes(len(bomb)) + bomb,  # types and kinds
                     bytes([2]) + number_bytes(len(empty)) + empty + b"\x01" + number_bytes(len(bomb)) + bomb):  # a plane
            with pytest.raises(SharefoldError, match="damaged or cut off"):
                decode_exact(memoryview(data), {"w": numbers})
        short = bytes([2]) + number_bytes(len(empty)) + empty + bytes(100)
        for size in (1 << 40, 1 << 28):
            with pytest.raises(SharefoldError, match="damaged or cut off"):  # 4 TB, 1 GB in 100 bytes
                decode_exact(memoryview(short), {"w": torch.empty(size, device="meta")})
        packed = zlib.compress(bytes([64 + 4, 0, 16]), 9)[2:-4]
        with pytest.raises(SharefoldError, match="damaged or cut off"):  # packed integers take a hundred bytes each to unpack
            data = bytes([2]) + number_bytes(len(packed)) + packed + bytes(1 << 21)
            decode_exact(memoryview(data), {"w": torch.empty(1 << 20, device="meta")})


def test_reading_takes_the_memory_of_the_result() -> None:
    tensors = {"w": torch.randn(12_000_000, generator=torch.Generator().manual_seed(2))}
    data = encode_exact(tensors)
    template = like(tensors)
    with within(kilobytes=48_000 + 24_000, seconds=10):
        found = decode_exact(memoryview(data), template)
    assert torch.equal(found["w"], tensors["w"])


def test_numbers_of_any_length() -> None:
    for number in (0, 1, 127, 128, 300, 1 << 63, (1 << 64) - 1):
        reader = ByteReader(memoryview(number_bytes(number)))
        assert reader.varint() == number and reader.done
    with pytest.raises(SharefoldError):
        ByteReader(memoryview(b"\x80" * 11)).varint()
