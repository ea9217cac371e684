"""What is put away at a boundary comes back, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx

from sharefold.repair import boundary
from sharefold.repair.boundary import Shelf, elements, shelf_for

NODES = [fx.Graph().placeholder(name) for name in "abc"]


def values() -> dict[fx.Node, Any]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, 4, generator=generator).permute(0, 2, 1)
    return {
        NODES[0]: first,
        NODES[1]: (torch.arange(5), [torch.tensor(True), torch.full((2,), 1e6), torch.zeros(0, 3)], 7, None),
        NODES[2]: torch.randn(3, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("half", "file_bytes"), [(False, 0), (True, 0), (True, 1 << 12), (False, 1 << 12), (True, 40)],
    ids=["memory", "half", "half on disk", "on disk", "disk too small"],
)  # fmt: skip
def test_values_come_back_in_their_types_as_copies(half: bool, file_bytes: int) -> None:
    shelf, given = Shelf(half, file_bytes), values()
    shelf.put(0, given)
    shelf.put(1, {NODES[0]: torch.ones(2)})
    for _ in range(2):
        found = shelf.get(0)
        assert found.keys() == given.keys()
        whole, (integers, (flag, large, empty), number, nothing), double = (found[node] for node in NODES)
        assert (number, nothing) == (7, None)
        assert torch.equal(integers, torch.arange(5)) and flag.dtype == torch.bool and bool(flag) and flag.shape == ()
        assert torch.equal(large, torch.full((2,), 1e6))  # beyond what half precision holds
        assert empty.shape == (0, 3) and empty.dtype == torch.float32
        assert double.dtype == torch.float64 and torch.equal(double, given[NODES[2]])
        assert whole.dtype == torch.float32 and whole.shape == (2, 4, 3)
        if half:
            assert torch.equal(whole, given[NODES[0]].half().float()) and not torch.equal(whole, given[NODES[0]])
        else:
            assert torch.equal(whole, given[NODES[0]])
        whole.zero_(), integers.zero_(), large.zero_()  # networks write into what they are given
    assert torch.equal(shelf.get(1)[NODES[0]], torch.ones(2))


def test_later_changes_of_what_was_put_away_do_not_reach_it() -> None:
    for shelf in (Shelf(False), Shelf(True), Shelf(True, 1 << 12)):
        x = torch.ones(4)
        shelf.put(0, {NODES[0]: x})
        x.zero_()
        assert torch.equal(shelf.get(0)[NODES[0]], torch.ones(4))


def test_what_is_dropped_is_gone() -> None:
    shelf = Shelf(False)
    shelf.put(0, values()), shelf.put(1, values())
    shelf.drop(0)
    with pytest.raises(KeyError):
        shelf.get(0)
    assert shelf.get(1).keys() == values().keys()


def test_elements_are_those_of_all_tensors_inside() -> None:
    assert [elements(value) for value in values().values()] == [24, 5 + 1 + 2, 3]
    assert elements(None) == elements(3) == 0


@pytest.mark.parametrize(
    ("memory", "half", "on_disk", "taken"), [(8000, False, False, 8000), (7999, True, False, 4000), (3999, True, True, 0)]
)
def test_memory_first_then_half_precision_then_a_file(memory: int, half: bool, on_disk: bool, taken: int) -> None:
    made, found = shelf_for(count=10, images=100, memory=memory)
    assert made is not None and found == taken
    shelf = made()
    assert shelf.half is half and (shelf._map is not None) is on_disk


def test_a_file_would_be_too_large_or_does_not_fit_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shelf_for(count=10, images=100, memory=4000 // boundary.DISK_FACTOR)[0] is not None
    assert shelf_for(count=10, images=100, memory=4000 // boundary.DISK_FACTOR - 1) == (None, 0)
    usage: Callable[[str], Any] = lambda _: SimpleNamespace(free=5000)  # noqa: E731
    monkeypatch.setattr(boundary.shutil, "disk_usage", usage)
    assert shelf_for(count=10, images=100, memory=2000) == (None, 0)
    assert shelf_for(count=10, images=100, memory=4000)[0] is not None
