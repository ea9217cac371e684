"""Checkpoints that calculate a size, a shape, a key, a type or an encoding, so that no look at the stream tells it."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pathlib
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


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little")


def many(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def listed(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + many(*arguments) + b"R"


def calculated(value: int) -> bytes:
    return call(name("builtins", "int"), text(str(value)))


def nested(function: bytes | None, depth: int = 24) -> bytes:
    """A list of ever deeper pairs of one pair; the last one's place in the memo is ``depth``."""
    steps = text("x") + b"q\x00"
    for i in range(depth):
        pair = listed(b"h" + bytes([i]), b"h" + bytes([i]))
        steps += (pair if function is None else call(function, pair)) + b"q" + bytes([i + 1])
    return listed(steps)


STORAGE = name("torch", "FloatStorage")
ORDERED = call(name("collections", "OrderedDict"))
ENCODED = call(name("_codecs", "encode"), text("storage"), text("latin1"))
TUPLE, FROZEN, BYTES = name("builtins", "tuple"), name("builtins", "frozenset"), name("builtins", "bytearray")
RECONSTRUCT = name("numpy.core.multiarray", "_reconstruct")


def stored(count: bytes = b"K\x04", first: bytes = text("storage"), *more: bytes) -> bytes:
    return many(first, STORAGE, text("0"), text("cpu"), count, *more) + b"Q"


def tensor(storage: bytes, shape: bytes, stride: bytes, offset: bytes = b"K\x00") -> bytes:
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, stride, b"\x89", ORDERED)


def beside(*parts: bytes) -> bytes:
    """A dict of the parts."""
    return b"}" + b"".join(text(f"k{i}") + part + b"s" for i, part in enumerate(parts))


BIG = 200_000_000
ONE = many(b"K\x00")
EXPLAINED = {
    "bytearray": call(BYTES, calculated(2 * BIG)),
    "tensor": call(name("torch", "FloatTensor"), calculated(BIG)),
    "arguments in a list": BYTES + listed(whole(2 * BIG)) + b"R",
    "sides": tensor(stored(), many(calculated(BIG)), ONE),
    "shape": tensor(stored(), call(TUPLE, listed(whole(BIG))), ONE),
    "size": tensor(stored(), call(name("torch", "Size"), call(TUPLE, listed(whole(BIG)))), ONE),
    "encoded storage": tensor(stored(first=ENCODED), many(whole(BIG)), ONE),
    "stride": tensor(stored(), many(b"K\x02"), many(whole(BIG))),
    "offset": tensor(stored(), many(b"K\x02"), many(b"K\x01"), whole(BIG)),
    "dtype of arrays": call(RECONSTRUCT, name("numpy", "ndarray"), many(b"K\x01"), text(f"({BIG},)f8")),
    "dtype": call(name("numpy", "dtype"), text(f"({BIG},)f8")),
    "key of tuples": beside(nested(TUPLE)) + b"h\x18K\x01s",
    "key of frozensets": beside(nested(FROZEN)) + b"h\x18K\x01s",
    "members": beside(nested(TUPLE), call(name("builtins", "set"), listed(b"h\x18"))),
    "text of lists": beside(nested(None), call(name("builtins", "str"), b"h\x18")),
    "text of lists in Python 2": beside(nested(None), call(name("__builtin__", "unicode"), b"h\x18")),
    "encoding": call(BYTES, text("\u4e00" * 9_000), text("punycode")),
    "a text again": listed(text("a" * 300_000) + b"q\x00", *[call(name("_codecs", "encode"), b"h\x00", text("utf8"))] * 900),
    "keys of one hash": b"}" + b"".join(b"\x8a\x10" + (i * (2**61 - 1)).to_bytes(16, "little") + b"Ns" for i in range(1, 9)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def frugal() -> Iterator[None]:
    """No test here may take 150 MB or five seconds."""
    with within(kilobytes=150_000, seconds=5):
        yield


def archive(path: Path, body: bytes, pickle_name: str = "m/data.pkl", **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(pickle_name, b"\x80\x02" + body + b".")
        file.writestr("m/version", "3\n")
        file.writestr("m/byteorder", "little")
        file.writestr("m/data/0", bytes(16))
        for other, data in others.items():
            file.writestr(other.replace("__", "/").replace("_", "."), b"\x80\x02" + data + b".")
    return path


@pytest.mark.parametrize("kind", EXPLAINED)
def test_what_is_calculated_is_refused_before_it_is_made(tmp_path: Path, kind: str) -> None:
    body = beside(EXPLAINED[kind])
    with pytest.raises(SharefoldError, match=r"more memory or time than its size explains|damaged or not a PyTorch") as error:
        read_state_dict(archive(tmp_path / "m.pt", body))
    assert "\n" not in str(error.value)
    with pytest.raises((TooLarge, Unclear)):
        check_pickle(io.BytesIO(b"\x80\x02" + body + b"."), 1000)


def test_storages_are_in_the_file_all_of_them(tmp_path: Path) -> None:
    old = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    plain, view = text("storage"), many(text("1"), b"K\x00", whole(BIG))
    for first, count, seen in (
        (ENCODED, whole(BIG), b"N"), (plain, calculated(BIG), b"N"), (plain, b"K\x04", b"N"), (plain, b"K\x04", view),
    ):  # fmt: skip
        for times in (1, 200):
            parts = [tensor(stored(count, first, seen).replace(text("0"), text(str(i)), 1), many(b"K\x04"), many(b"K\x01"))
                     for i in range(times)]  # fmt: skip
            body = b"\x80\x02" + beside(*parts) + b"."
            stream = io.BytesIO(b"".join([*old, body, pickle.dumps(["0"], 2)]))
            if count == b"K\x04" and seen == b"N" and times == 1:
                check_pickle(stream, 1000)
            else:
                with pytest.raises((TooLarge, Unclear)):
                    check_pickle(stream, 1000)


def test_the_pickle_that_torch_reads_is_the_one_that_is_looked_at(tmp_path: Path) -> None:
    bad, good = beside(tensor(stored(), many(whole(BIG)), ONE)), beside(tensor(stored(), many(b"K\x04"), many(b"K\x01")))
    with pytest.raises(SharefoldError, match="a tensor of 200,000,000 elements in a storage of 4"):
        read_state_dict(archive(tmp_path / "case.pt", bad, "m/DATA.PKL", m__z__data_pkl=good))
    with pytest.raises(SharefoldError, match="two of its entries have one name"):
        read_state_dict(archive(tmp_path / "twice.pt", bad, "m/DATA.PKL", m__data_pkl=good))
    assert [*read_state_dict(archive(tmp_path / "good.pt", good, "m/Data.Pkl"))[0]] == ["k0"]
    # An old pickle with an archive behind it: torch goes by the first bytes.
    body = b"\x80\x02" + EXPLAINED["bytearray"] + b"."
    (tmp_path / "behind.pt").write_bytes(body + (tmp_path / "good.pt").read_bytes())
    with pytest.raises(SharefoldError, match="more memory or time than its size explains"):
        read_state_dict(tmp_path / "behind.pt")


@pytest.mark.parametrize("deflated", ["one", "all"])
def test_deflated_entries_are_inflated(tmp_path: Path, deflated: str) -> None:
    state = {"w": torch.arange(5000.0), "ones": torch.ones(5000)}
    torch.save(state, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "n.pt", "w") as new:
        for entry in old.namelist():
            small = deflated == "all" or entry.endswith("data/1")
            new.writestr(zipfile.ZipInfo(entry), old.read(entry), zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED)
    found, _ = read_state_dict(tmp_path / "n.pt")
    assert all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_all_that_training_scripts_store_is_let_through(tmp_path: Path, zipped: bool) -> None:
    marked, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3))
    marked.note, parameter.note = 1, {"a": 2}  # type: ignore[attr-defined]
    state = {
        "marked": marked, "parameter": parameter, "half": torch.ones(2, 3).half(), "brain": torch.ones(2).bfloat16(),
        "double": torch.ones(3, 2).double().t(), "complex": torch.ones(2, dtype=torch.complex64),
        "view": torch.arange(10.0)[3:9:2],
    }  # fmt: skip
    counts = collections.Counter("aab")
    metadata = collections.OrderedDict(a=1)
    metadata._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content: dict[str, Any] = {
        "state_dict": state, "raw": b"12" * 40, "array": bytearray(b"345"), "none": bytearray(), "complex": 1j, "counts": counts,
        "set": {1, "a", (1, 2)}, "frozen": frozenset([1]), "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a/b")),
        "when": datetime.datetime(2020, 1, 2), "took": datetime.timedelta(3), "defaults": collections.defaultdict(list, a=[1]),
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3), "order": np.asfortranarray(np.eye(3)), "best": np.float32(0.5),
        "flag": np.bool_(True), "kind": np.dtype("float64"), "metadata": metadata, "device": torch.device("cpu"),
        "type": torch.float16,
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999), "params": [0]}]},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best": torch.tensor(0.1), "dirpath": "/a"}}, "big": 1 << 100,
    }  # fmt: skip
    if zipped:  # torch cannot read these in its older format
        content.update(eight=torch.ones(2).to(torch.float8_e5m2), sixteen=torch.ones(2, dtype=torch.uint16))
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    found, notes = read_state_dict(tmp_path / "m.ckpt")
    assert all(torch.equal(found[key], value.detach()) for key, value in state.items())
    assert notes["extras"]["best"] == 0.5


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_let_through(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {"whole": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}
    torch.save(tensors, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as file:
        check_pickle(io.BytesIO(file.read("m/data.pkl")), 1000)
