"""Files of equal content are equal to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sharefold.safetensors_file import write_tensors

TENSORS = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.int8), "none": torch.zeros(0, 4)}
TEXTS = {
    "sharefold": '{"name": "n\u00fc\u4e2d\U0001f600 \\" \\\\ /", "tab": "\t"}',
    "format": "pt",
    "sum": "0" * 8,
    "zero": "\x00\x1f\x7f",
}


def header(path: Path) -> bytes:
    content = path.read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def test_many_writes_give_one_file(tmp_path: Path) -> None:
    contents = set()
    for number in range(20):  # the library's order differs from map to map: among 20 of 4 texts some would differ
        target = tmp_path / f"{number}.safetensors"
        write_tensors(target, TENSORS, TEXTS)
        contents.add(target.read_bytes())
    assert len(contents) == 1


def test_everything_is_read_as_it_was_given(tmp_path: Path) -> None:
    target, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(target, TENSORS, TEXTS)
    save_file(TENSORS, str(theirs), TEXTS)
    assert target.stat().st_size == theirs.stat().st_size
    with safe_open(target, "pt") as found:
        assert found.metadata() == TEXTS
        assert set(found.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(found.get_tensor(name), tensor) and found.get_tensor(name).dtype == tensor.dtype
    start = header(target).index(b'"format"'), header(target).index(b'"sharefold"'), header(target).index(b'"zero"')
    assert start == tuple(sorted(start))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_without_and_with_a_single_text(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    target = tmp_path / "net.safetensors"
    write_tensors(target, TENSORS, metadata)
    with safe_open(target, "pt") as found:
        assert (found.metadata() or {}) == (metadata or {})
        assert torch.equal(found.get_tensor("b.weight"), TENSORS["b.weight"])
