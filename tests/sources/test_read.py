"""Checkpoint files: what is read, what is refused, and that nothing in them ever runs."""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.sources import read_state_dict


class Runs:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.target,)


def one_line(error: pytest.ExceptionInfo[SharefoldError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def weights() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.randn(4, 3, 3, 3), "conv.bias": torch.randn(4)}


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file(tmp_path: Path, zipped: bool) -> None:
    state = weights()
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    read, notes = read_state_dict(tmp_path / "m.pt")
    assert list(read) == list(state)
    assert all(torch.equal(read[key], state[key]) for key in state)
    assert notes["format"] == "torch" and notes["unwrapped"] == []


def test_safetensors_file(tmp_path: Path) -> None:
    state = {"a": torch.randn(2), "h": torch.randn(3).half()}
    save_file(state, str(tmp_path / "m.safetensors"))
    read, notes = read_state_dict(tmp_path / "m.safetensors")
    assert torch.equal(read["h"], state["h"]) and read["h"].dtype == torch.float16
    assert notes["format"] == "safetensors"


@pytest.mark.parametrize("zipped", [True, False])
def test_harmless_extras(tmp_path: Path, zipped: bool) -> None:
    """What training scripts store beside the weights: options, numpy scalars and arrays, paths, counters."""
    beside = {
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("/x"), data=Path("y")),
        "best": np.float64(91.5),
        "count": np.int64(7),
        "history": np.arange(3.0),
        "log": collections.defaultdict(list, loss=[1.0, 2.0]),
        "epoch": 3,
        "note": "text",
    }
    state = weights()
    torch.save({"state_dict": state, **beside}, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    read, notes = read_state_dict(tmp_path / "m.pth")
    assert torch.equal(read["conv.weight"], state["conv.weight"])
    assert notes["extras"] == {"best": 91.5, "count": 7, "epoch": 3, "note": "text"}
    assert type(notes["extras"]["best"]) is float


def test_numpy_arrays_as_weights(tmp_path: Path) -> None:
    torch.save({"fc.weight": np.ones((2, 3), dtype=np.float32)}, tmp_path / "m.pt")
    read, _ = read_state_dict(tmp_path / "m.pt")
    assert torch.equal(read["fc.weight"], torch.ones(2, 3))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle2", "pickle4", "pickle5"])
@pytest.mark.parametrize("place", ["beside", "in_namespace", "in_array", "as_key"])
def test_code_never_runs(tmp_path: Path, form: str, place: str) -> None:
    target, file = tmp_path / "made", tmp_path / "m.pt"
    evil: Any = Runs(target)
    content: dict[Any, Any] = {"state_dict": weights()}
    if place == "in_namespace":
        content["args"] = argparse.Namespace(x=evil)
    elif place == "in_array":
        content["array"] = np.array([evil], dtype=object)
    elif place == "as_key":
        content[evil] = 1
    else:
        content["extra"] = evil
    if form in ("zip", "legacy"):
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    else:
        file.write_bytes(pickle.dumps(content, protocol=int(form[-1])))
    with pytest.raises(SharefoldError) as error:
        read_state_dict(file)
    text = one_line(error)
    assert f"{os.mkdir.__module__}.mkdir" in text and "--trust-pickle" in text
    assert not target.exists()


def test_listed_globals_are_exact(tmp_path: Path) -> None:
    """Names that come twice go through the pickle's memo; tensors and containers are not listed."""
    content = {"a": Runs(tmp_path / "x"), "b": Runs(tmp_path / "y"), "w": torch.ones(2), "n": np.float32(1)}
    torch.save(content, tmp_path / "m.pt", pickle_protocol=4)
    with pytest.raises(SharefoldError, match=rf"run code: {os.mkdir.__module__}\.mkdir: pass"):
        read_state_dict(tmp_path / "m.pt")


def test_storage_loader_is_listed(tmp_path: Path) -> None:
    """A plain pickle of tensors goes through a function of torch that unpickles bytes without any check."""
    (tmp_path / "m.pt").write_bytes(pickle.dumps({"w": torch.ones(2)}))
    with pytest.raises(SharefoldError, match=r"torch\.storage\._load_from_bytes"):
        read_state_dict(tmp_path / "m.pt")


def test_trust_pickle_runs_it(tmp_path: Path) -> None:
    """The switch does what its name says, and only where the file needs it."""
    target, file = tmp_path / "made", tmp_path / "m.pt"
    state = weights()
    torch.save({"state_dict": state, "extra": Runs(target)}, file)
    read, notes = read_state_dict(file, trust_pickle=True)
    assert target.is_dir() and notes["format"] == "pickle"
    assert torch.equal(read["conv.bias"], state["conv.bias"])
    torch.save(state, file)
    assert read_state_dict(file, trust_pickle=True)[1]["format"] == "torch"


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_module(tmp_path: Path, zipped: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(SharefoldError) as error:
        read_state_dict(tmp_path / "m.pt")
    text = one_line(error)
    listed = text.split("run code: ")[1].split(": pass")[0].split(", ")
    assert "torch.nn.modules.container.Sequential" in listed
    assert {"torch.nn.modules.conv.Conv2d", "torch.nn.modules.activation.ReLU"} <= set(listed)
    assert not any("_rebuild" in name or "OrderedDict" in name for name in listed)
    read, notes = read_state_dict(tmp_path / "m.pt", trust_pickle=True)
    assert torch.equal(read["0.weight"], model[0].weight) and type(notes["module"]) is nn.Sequential


def test_trusted_pickle_of_a_missing_class(tmp_path: Path) -> None:
    file = tmp_path / "m.pt"
    file.write_bytes(b"\x80\x02cno_such_module\nThing\n.")
    with pytest.raises(SharefoldError, match=r"no_such_module\.Thing: pass --trust-pickle"):
        read_state_dict(file)
    with pytest.raises(SharefoldError, match=r"cannot be unpickled \(ModuleNotFoundError"):
        read_state_dict(file, trust_pickle=True)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_random_bytes(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"m{suffix}"
    rng = np.random.default_rng(0)
    for length in (1, 7, 100, 5000):
        file.write_bytes(rng.bytes(length))
        with pytest.raises(SharefoldError, match="damaged or not") as error:
            read_state_dict(file)
        assert str(file) in one_line(error)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_truncated(tmp_path: Path, kind: str, share: float) -> None:
    file = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    state = {"w": torch.randn(50, 50), "v": torch.randn(50)}
    if kind == "safetensors":
        save_file(state, str(file))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind == "zip")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(SharefoldError, match="damaged or not") as error:
        read_state_dict(file)
    one_line(error)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match="does not exist"):
        read_state_dict(tmp_path / "absent.pt")


def test_directory_and_empty_file(tmp_path: Path) -> None:
    with pytest.raises(SharefoldError, match="directory without a model"):
        read_state_dict(tmp_path)
    (tmp_path / "m.pt").touch()
    with pytest.raises(SharefoldError, match=r"is empty \(0 bytes\)"):
        read_state_dict(tmp_path / "m.pt")


def test_other_archives(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones(3))
    with pytest.raises(SharefoldError, match="zip archive but not a PyTorch checkpoint"):
        read_state_dict(tmp_path / "data.npz")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/constants.pkl", b"")
    with pytest.raises(SharefoldError, match="TorchScript"):
        read_state_dict(tmp_path / "script.pt")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_values_that_are_not_finite(tmp_path: Path, value: float, word: str) -> None:
    state = {"fine": torch.ones(3), "conv1.weight": torch.ones(4, 3, 6, 6), "later": torch.full((2,), value)}
    state["conv1.weight"].view(-1)[:12] = value
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(SharefoldError, match=rf"weights hold {word}: conv1\.weight \(12 of 432 values\)"):
        read_state_dict(tmp_path / "m.pt")


def test_empty_and_missing_values(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(0, 3)}, tmp_path / "m.pt")
    with pytest.raises(SharefoldError, match=r"empty tensor: b .* shape \(0, 3\)"):
        read_state_dict(tmp_path / "m.pt")
    torch.save({"a": torch.ones(1), "b": None}, tmp_path / "m.pt")
    with pytest.raises(SharefoldError, match="empty entry: b"):
        read_state_dict(tmp_path / "m.pt")
    torch.save({"a": torch.ones(1), "s": torch.eye(3).to_sparse()}, tmp_path / "m.pt")
    with pytest.raises(SharefoldError, match="sparse tensor: s"):
        read_state_dict(tmp_path / "m.pt")
    torch.save({"a": torch.ones(1, device="meta")}, tmp_path / "m.pt")
    with pytest.raises(SharefoldError, match="tensor without values: a"):
        read_state_dict(tmp_path / "m.pt")


def test_extension_codes_of_a_whole_pickle_are_named(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.PROTO + b"\x02" + pickle.EXT1 + b"\x05" + pickle.STOP)
    with pytest.raises(SharefoldError, match=r"would import and run code: \(extension code 5\)"):
        read_state_dict(tmp_path / "m.pt")


HIDDEN = {
    # Texts that are popped again before the name is taken from the stack.
    "popped": b"\x80\x02cfractions\nFraction\n0X\x02\x00\x00\x00osX\x06\x00\x00\x00systemX\x0b\x00\x00\x00collections"
    b"X\x0b\x00\x00\x00OrderedDict00\x93X\x04\x00\x00\x00true\x85R.",
    # A text that Python's own reader of opcodes refuses, and torch's does not.
    "unreadable": b"cfractions\nFraction\n0S'\xc3\xa9'\n0cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_a_pickle_hides_is_told_or_not_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pt").write_bytes(HIDDEN[kind])
    told = r"computed while unpickling" if kind == "popped" else r"\(and what cannot be read\)"
    with pytest.raises(SharefoldError, match=told):
        read_state_dict(tmp_path / "m.pt")
    ran: list[str] = []
    monkeypatch.setattr("os.system", ran.append)
    if kind == "unreadable":
        with pytest.raises(SharefoldError, match="damaged, or hides what it would run"):
            read_state_dict(tmp_path / "m.pt", trust_pickle=True)
        assert ran == []
