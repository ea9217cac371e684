"""Checkpoints made to cost memory or time: refused before anything is allocated."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from limits import within

from sharefold.errors import SharefoldError
from sharefold.sources import read_state_dict
from sharefold.sources.pickle_sizes import TooLarge, Unclear, check_pickle
from sharefold.sources.unwrap import unwrap


def module(name: str, attribute: str) -> bytes:
    return b"c" + name.encode() + b"\n" + attribute.encode() + b"\n"


def integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


BIG = 1 << 33


def nested_key(depth: int) -> bytes:
    """A tuple of nine times the same tuple of nine times ... as a key."""
    text = b"K\x01\x85q\x00"
    for _ in range(depth):
        text += b"(" + b"h\x00" * 9 + b"tq\x00"
    return text


def nested_dict(depth: int) -> bytes:
    text = b"}q\x00"
    for _ in range(depth):
        pairs = b"".join(
            b"X" + struct.pack("<I", len(name)) + name + b"h\x00"
            for name in (b"state_dict", b"model_state_dict", b"model", b"net", b"module", b"weights", b"model_ema", b"ema")
        )
        text += b"}(" + pairs + b"uq\x00"
    return text


BOMBS = {
    "ndarray": module("numpy", "ndarray") + b"(" + integer(BIG) + b"\x85" + b"tR",
    "reconstruct": module("numpy.core.multiarray", "_reconstruct") + module("numpy", "ndarray") + integer(BIG)
    + b"\x85" + b"C\x01b" + b"\x87R",
    "bytearray": module("builtins", "bytearray") + integer(BIG) + b"\x85R",
    "old bytearray": module("__builtin__", "bytearray") + integer(BIG) + b"\x85R",
    "scalar": module("numpy.core.multiarray", "scalar") + module("numpy", "dtype") + b"X\x0b\x00\x00\x00V2000000000" + b"\x85R"
    + b"\x85R",
    "storage": module("torch.storage", "UntypedStorage") + integer(BIG) + b"\x85R",
    "tensor": module("torch", "Tensor") + integer(BIG) + b"\x85R",
    "key": nested_key(12) + b"}h\x00K\x01s",
    "members": nested_key(12) + module("builtins", "set") + b"](h\x00e" + b"\x85R",
}  # fmt: skip


def write_zip(path: Path, body: bytes, **records: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("m/version", "3\n")
        archive.writestr("m/byteorder", "little")
        for name, data in records.items():
            archive.writestr(f"m/data/{name[1:]}", data)
    return path


@pytest.fixture(autouse=True)
def frugal() -> Iterator[None]:
    """No test here may take 300 MB or ten seconds."""
    with within(kilobytes=300_000, seconds=10):
        yield


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", BOMBS)
def test_sizes_without_bytes_are_refused(tmp_path: Path, kind: str, zipped: bool) -> None:
    body = BOMBS[kind]
    path = tmp_path / "m.pt"
    if zipped:
        write_zip(path, body)
    else:
        path.write_bytes(b"\x80\x02" + body + b".")
    with pytest.raises(SharefoldError) as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)
    if zipped:
        assert "more memory or time than its size explains" in str(error.value)


def tensor_of(shape: bytes, count: bytes, stride: bytes) -> bytes:
    storage = b"(X\x07\x00\x00\x00storage" + module("torch", "FloatStorage") + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count
    return module("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"tQ" + b"K\x00" + shape + stride + b"\x89" + (
        module("collections", "OrderedDict") + b")RtR"
    )


@pytest.mark.parametrize("sized", [False, True])
def test_a_tensor_that_is_larger_than_its_storage(tmp_path: Path, sized: bool) -> None:
    shape = integer(BIG) + b"\x85"
    shape = module("torch", "Size") + shape + b"\x85R" if sized else shape
    body = b"}X\x01\x00\x00\x00a" + tensor_of(shape, b"K\x04", b"K\x00\x85") + b"s"
    path = write_zip(tmp_path / "m.pt", body, r0=bytes(16))
    with pytest.raises(SharefoldError, match=r"a tensor of 8,589,934,592 elements in a storage of 4"):
        read_state_dict(path)
    body = b"}X\x01\x00\x00\x00a" + tensor_of(integer(BIG) + b"\x85", integer(BIG), b"K\x01\x85") + b"s"
    with pytest.raises(SharefoldError, match="a storage of 8,589,934,592 elements in a file of"):
        read_state_dict(write_zip(tmp_path / "n.pt", body, r0=bytes(16)))


def test_nested_and_self_referencing_containers_take_no_time(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "m.pt", nested_dict(40))
    with pytest.raises(SharefoldError, match="no state dict"):
        read_state_dict(path)
    loop: dict[str, Any] = {}
    loop["state_dict"] = loop
    for content in (loop, {"model": loop}):
        with pytest.raises(SharefoldError) as error:
            unwrap(content, "file")
        assert "\n" not in str(error.value)
    torch.save(loop, tmp_path / "loop.pt")
    with pytest.raises(SharefoldError):
        read_state_dict(tmp_path / "loop.pt")


def test_what_training_scripts_store_is_let_through(tmp_path: Path) -> None:
    content = {
        "state_dict": {"a": torch.randn(3, 4), "t": torch.randn(4, 3).t(), "e": torch.ones(1).expand(1000), "0": torch.tensor(1)},
        "best": np.float64(0.5), "array": np.arange(6).reshape(2, 3),
        "betas": (0.9, (0.1, 0.2)), ("a", 1): {1: 2},
        "parameter": torch.nn.Parameter(torch.ones(2)), "raw": b"12", "size": torch.Size([1, 2]), "kind": torch.float16,
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        state, notes = read_state_dict(tmp_path / "m.pt")
        assert all(torch.equal(state[k], t) for k, t in content["state_dict"].items())  # type: ignore[attr-defined]
        assert notes["extras"]["best"] == 0.5
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(bytearray(b"abc"), 2))
    with (tmp_path / "plain.pkl").open("rb") as stream:
        check_pickle(stream, 100)


def test_an_index_of_the_memo_takes_no_memory() -> None:
    import io

    check_pickle(io.BytesIO(b"\x80\x02Nr\xff\xff\xff\x7f."), 9)
    with pytest.raises(TooLarge):
        check_pickle(io.BytesIO(b"\x80\x02" + BOMBS["bytearray"] + b"."), 60)


def test_bytes_of_newer_protocols_are_no_longer_than_the_file() -> None:
    import io

    body = pickle.dumps(bytearray(b"abc"), 5)
    check_pickle(io.BytesIO(body), len(body))
    longer = b"\x80\x05" + pickle.BYTEARRAY8 + struct.pack("<Q", BIG) + b"abc."
    with pytest.raises(Unclear, match=f"{BIG} bytes of which the file holds"):
        check_pickle(io.BytesIO(longer), len(longer))


def test_damaged_archives_are_told_by_their_own_checksums(tmp_path: Path) -> None:
    state = {"w": torch.randn(1000)}
    path = tmp_path / "m.pt"
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    place = data.index(state["w"].numpy().tobytes()[:16]) + 400
    data[place] ^= 4
    path.write_bytes(data)
    with pytest.raises(SharefoldError, match=r"is damaged: the checksum of m/data/0 does not hold") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


def test_archives_without_checksums_and_those_that_inflate(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_state_dict(path)[0]["w"], torch.ones(3))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data/0", bytes(1 << 24))
    with pytest.raises(SharefoldError, match="claims to hold more bytes"):
        read_state_dict(path)
