"""How much fits at once: images a batch, and things a run."""

from __future__ import annotations

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
