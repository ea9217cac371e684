"""How much fits at once: images a batch, and things a run."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

from sharefold.checkpoint import load
from sharefold.data import ArrayDataset, Preprocess, with_truth
from sharefold.errors import SharefoldError
from sharefold.hub import load_from_hub
from sharefold.measure import evaluate
from sharefold.running import batch_within, one_thread, runs_within, usable_device
from sharefold.tasks import evaluate_task
from sharefold.verify import verify


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


@pytest.mark.parametrize(
    ("device", "words"),
    [("toaster", "device 'toaster' is not known: use cpu, cuda"), ("cuda:99", "try cpu"), (None, "device None is not known")],
)
def test_devices_that_are_not_there_are_refused_in_one_line_wherever_they_are_given(tmp_path, device, words) -> None:
    assert usable_device("cpu") == torch.device("cpu")
    net = nn.Linear(2, 2)
    pictures = ArrayDataset(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), None, Preprocess((3, 2, 2)))
    pictures.answers = np.zeros((1, 2, 2), np.uint8)
    for use in (
        lambda: usable_device(device),
        lambda: load(tmp_path, model=net, device=device),
        lambda: load_from_hub("nobody/nothing", device=device),
        lambda: evaluate(net, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))], device),
        lambda: verify(tmp_path, model=net, device=device),
        lambda: evaluate_task(net, with_truth(pictures, None, "test"), device=device),
    ):
        with pytest.raises(SharefoldError, match=words) as told:
            use()
        assert "\n" not in str(told.value)
