"""How much fits at once: images a batch, and things a run."""

from __future__ import annotations

import threading

import pytest
import torch

from sharefold.running import batch_within, one_thread, runs_within


@pytest.mark.parametrize(
    ("elements", "each", "most", "least", "batch"),
    [(1000, 10, 200, 1, 100), (1000, 10, 64, 1, 64), (1000, 3000, 64, 1, 1), (1000, 300, 64, 8, 8), (1000, 0, 64, 1, 64)],
)
def test_images_a_batch(elements: int, each: int, most: int, least: int, batch: int) -> None:
    assert batch_within(elements, each, most, least) == batch


def test_runs_fit_together_in_order() -> None:
    assert runs_within(10, [4, 6, 1, 12, 3, 7, 1]) == [[0, 1], [2], [3], [4, 5], [6]]
    assert runs_within(10, []) == []


def test_one_thread_is_given_back_whatever_happens() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="within"), one_thread():
            assert torch.get_num_threads() == 1
            raise ValueError("within")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_one_thread_is_left_by_several_at_once() -> None:
    """Whoever comes second must not take the first one's setting for the user's."""
    before, inside, leave = torch.get_num_threads(), threading.Event(), threading.Event()

    def second() -> None:
        with one_thread():
            inside.set()
            leave.wait(10)

    try:
        torch.set_num_threads(2)
        other = threading.Thread(target=second)
        with one_thread():
            other.start()
            assert inside.wait(10)
        leave.set()
        other.join()
        counts: list[int] = []
        new = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        new.start()
        new.join()
        assert counts == [2]
    finally:
        torch.set_num_threads(before)
