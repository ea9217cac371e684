"""Tensors of a file as a network takes them: which array is which input, in which type, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sharefold.data import InputsDataset, loader, open_data, read_tensors
from sharefold.errors import SharefoldError
from sharefold.inputs import Inputs, each_of

LEFT, RIGHT = (np.random.default_rng(seed).normal(size=(6, 1, 5, 5)) for seed in (1, 2))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.conv(left) - self.conv(right)).flatten(1)


class Words(nn.Module):
    """An image, whole numbers that choose rows, and perhaps a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rows = nn.Conv2d(1, 4, 3), nn.Embedding(7, 4)

    def forward(self, image: Tensor, word: Tensor, mask: Tensor | None = None) -> Tensor:
        found = self.conv(image).mean((2, 3)) + self.rows(word)
        return found if mask is None else torch.where(mask, found, 0)


class Any_(nn.Module):
    def forward(self, *views: Tensor) -> Tensor:
        return torch.stack(views).sum(0)


class Counting(nn.Module):
    """Writes on itself whenever it runs: a number, a list, a buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.runs = nn.Conv2d(1, 2, 3), 0
        self.seen: list[int] = []
        self.register_buffer("total", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor) -> Tensor:
        self.runs += 1
        self.seen.append(len(image))
        self.total += len(image)
        return self.conv(image).mean((2, 3))


def npz(path: Path, *plain: Any, **named: Any) -> str:
    np.savez(path, *plain, **named)
    return f"tensors:{path}"


def message(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SharefoldError) as error:
        call(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


def same(found: InputsDataset, *wanted: np.ndarray) -> None:
    got = each_of(found.inputs)
    assert len(got) == len(wanted)
    for tensor, array in zip(got, wanted, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array).to(tensor.dtype))


def test_arrays_are_matched_by_the_names_of_the_parameters(tmp_path: Path) -> None:
    named = read_tensors(npz(tmp_path / "a.npz", right=RIGHT, left=LEFT)).of(Two())
    same(named, LEFT, RIGHT)
    assert not named.labelled and all(tensor.dtype == torch.float32 for tensor in each_of(named.inputs))
    same(read_tensors(npz(tmp_path / "b.npz", RIGHT, LEFT)).of(Two()), RIGHT, LEFT)  # without names: in order
    save_file({"right": torch.ones(6, 1, 5, 5), "left": torch.zeros(6, 1, 5, 5)}, str(tmp_path / "c.safetensors"))
    zeros = read_tensors(f"tensors:{tmp_path / 'c.safetensors'}").of(Two())
    same(zeros, np.zeros((6, 1, 5, 5)), np.ones((6, 1, 5, 5)))


def test_a_network_that_writes_on_itself_is_left_as_it_was(tmp_path: Path) -> None:
    net = Counting()
    read_tensors(npz(tmp_path / "a.npz", LEFT)).of(net)
    assert (net.runs, net.seen, net.total.item(), net.training) == (0, [], 0, True)


def test_twelve_arrays_without_names_stay_in_order(tmp_path: Path) -> None:
    views = [np.full((3, 2), float(place)) for place in range(12)]
    same(read_tensors(npz(tmp_path / "a.npz", *views)).of(Any_()), *views)


def test_one_array_needs_no_name_and_labels_stand_beside(tmp_path: Path) -> None:
    net = nn.Conv2d(1, 2, 3)
    np.save(tmp_path / "a.npy", LEFT.astype(">f4"))
    one = read_tensors(f"tensors:{tmp_path / 'a.npy'}").of(net)
    assert isinstance(one.inputs, Tensor)
    same(one, LEFT.astype("f4"))
    labels = np.arange(6, dtype=np.int16)
    found = read_tensors(npz(tmp_path / "b.npz", anything=LEFT, labels=labels)).of(net)
    same(found, LEFT)
    assert found.labelled and found.labels.dtype == torch.int64 and found.labels.tolist() == labels.tolist()
    batches = list(loader(found, 4))
    assert [len(x) for x, _ in batches] == [4, 2] and batches[1][1].tolist() == [4, 5]


def test_whole_numbers_and_masks_keep_their_type(tmp_path: Path) -> None:
    word, mask = np.arange(6), np.arange(24).reshape(6, 4) % 2 == 0
    found = read_tensors(npz(tmp_path / "a.npz", mask=mask, word=word, image=LEFT)).of(Words())
    assert [tensor.dtype for tensor in each_of(found.inputs)] == [torch.float32, torch.int64, torch.bool]
    (first, label) = found[3]
    assert isinstance(first, tuple) and int(first[1]) == 3 and int(label) == -1
    without = read_tensors(npz(tmp_path / "b.npz", word=word, image=LEFT)).of(Words())
    assert isinstance(without.inputs, Inputs) and len(without.inputs.tensors) == 2
    wide = read_tensors(npz(tmp_path / "c.npz", a=np.array([1, 2**31], np.uint32), b=np.array([1, 2], np.uint16)))
    assert [tensor.dtype for tensor in wide.tensors.values()] == [torch.int64, torch.int32]
    assert wide.tensors["a"].tolist() == [1, 2**31]
    kinds = (torch.uint16, torch.uint32, torch.uint64)
    save_file({str(kind): torch.tensor([1, 2]).to(kind) for kind in kinds}, str(tmp_path / "d.safetensors"))
    wide = read_tensors(f"tensors:{tmp_path / 'd.safetensors'}")
    assert {str(kind): wide.tensors[str(kind)].dtype for kind in kinds} == {
        "torch.uint16": torch.int32, "torch.uint32": torch.int64, "torch.uint64": torch.int64,
    }  # fmt: skip


@pytest.mark.parametrize("number", [99, -1])
def test_whole_numbers_that_no_table_holds_are_found_in_any_sample(tmp_path: Path, number: int) -> None:
    words = np.arange(12).reshape(6, 2) % 4
    words[4, 1] = number
    told = message(read_tensors(npz(tmp_path / "a.npz", words)).of, nn.Embedding(4, 3))
    assert "Embedding fails on sample 4, of shape (1, 2) (index out of range" in told


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": LEFT, "b": RIGHT}, r"a, b cannot be matched: forward of Two takes left, right: call them left, right"),
        ({"left": LEFT, "right": RIGHT, "more": LEFT}, "more cannot be matched"),
        ({"right": RIGHT}, "it holds right but no left, and forward of Two takes left, right: add left"),
        ({"left": LEFT}, r"1 tensor is given, forward of Two takes 2 \(left, right\)"),
        ({"x": LEFT}, r"1 tensor is given, forward of Two takes 2 \(left, right\)"),
        ({"labels": np.arange(6)}, "it holds labels alone"),
        ({"left": LEFT, "right": RIGHT, "labels": LEFT[:, 0, 0, 0]}, r"labels are float32 \(6,\): want classes"),
        ({"left": LEFT, "right": RIGHT, "labels": np.ones((6, 2), int)}, r"labels are int64 \(6, 2\): want classes"),
        ({"left": LEFT, "right": RIGHT[:, :, :4]}, r"Two fails on its first sample, of shape \(1, 1, 5, 5\), \(1, 1, 4, 5\)"),
        ({"left": LEFT[:, 0], "right": np.ones((6, 3, 5, 5))}, "Two fails on its first sample"),
    ],
)
def test_what_does_not_fit_the_network_is_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    file = read_tensors(npz(tmp_path / "a.npz", **arrays))
    assert re.search(words, message(file.of, Two()))


def test_a_network_that_does_not_name_its_inputs_takes_them_in_order_alone(tmp_path: Path) -> None:
    file = read_tensors(npz(tmp_path / "a.npz", one=LEFT, two=RIGHT))
    assert "forward of Any_ does not name its inputs: save them without names" in message(file.of, Any_())


BAD = LEFT.copy()
BAD[4, 0, 2, 2] = np.nan


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({}, "it holds no arrays"),
        ({"left": LEFT, "right": RIGHT[:5]}, "different numbers of samples (left 6, right 5)"),
        ({"left": LEFT, "labels": np.arange(5)}, "different numbers of samples (left 6, labels 5)"),
        ({"left": BAD}, "left holds NaN, infinity or numbers beyond float32 (1 of them, the first in sample 4)"),
        ({"left": np.full((2, 3), np.inf)}, "left holds NaN, infinity"),
        ({"left": np.full((2, 3), 1e300)}, "numbers beyond float32"),
        ({"left": np.array([1.0, np.nan])}, "the first in sample 1"),
        ({"left": np.array([{}, {}])}, "left holds Python objects"),
        ({"left": np.array(["a", "b"])}, "left is <U1: want floats"),
        ({"left": np.ones(3, complex)}, "left is complex128: want floats"),
        ({"left": np.float32(3)}, "left is a single number"),
        ({"left": LEFT[:0]}, "left has no samples (shape (0, 1, 5, 5))"),
        ({"left": LEFT[:, :0]}, "left has samples without a number"),
        ({"left": np.array([2**64 - 1], np.uint64)}, "beyond what int64 holds"),
    ],
)
def test_arrays_that_no_network_takes_are_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    spec = npz(tmp_path / "a.npz", **arrays)
    assert words in message(read_tensors, spec) and f"data {spec}: " in message(read_tensors, spec)


def test_files_that_hold_no_tensors_are_refused(tmp_path: Path) -> None:
    for name in ("a.npz", "a.npy", "a.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert "is empty (0 bytes)" in message(read_tensors, f"tensors:{tmp_path / name}")
        (tmp_path / name).write_bytes(b"no such format, but many bytes of it" * 9)
        assert "not" in message(read_tensors, f"tensors:{tmp_path / name}")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    assert "holds Python objects" in message(read_tensors, f"tensors:{tmp_path / 'objects.npy'}")
    np.save(tmp_path / "cut.npy", LEFT)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    assert "which it is not: damaged" in message(read_tensors, f"tensors:{tmp_path / 'cut.npy'}")
    torch.save({"left": torch.ones(2, 2)}, tmp_path / "a.pt")
    assert "want a file ending in .npz, .npy, .safetensors" in message(read_tensors, f"tensors:{tmp_path / 'a.pt'}")
    assert "no such file" in message(read_tensors, f"tensors:{tmp_path / 'b.npz'}")
    assert "it is a folder" in message(read_tensors, f"tensors:{tmp_path}")
    assert "must follow the colon" in message(read_tensors, "tensors:")
    assert "read_tensors(spec).of(network)" in message(open_data, f"tensors:{tmp_path / 'b.npz'}")
