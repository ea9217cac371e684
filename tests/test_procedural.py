"""Dead leaves: range, determinism, and the statistics that make them stand in for photographs."""

from __future__ import annotations

import time

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.procedural import dead_leaves


@pytest.mark.parametrize(
    ("count", "size", "channels"),
    [(1, (1, 1), 1), (3, (8, 8), 1), (4, (17, 40), 3), (2, (33, 32), 5), (1, (224, 224), 3)],
)
def test_shape_range_and_type(count: int, size: tuple[int, int], channels: int) -> None:
    images = dead_leaves(count, size, channels)
    assert images.shape == (count, channels, *size) and images.dtype == torch.float32
    assert float(images.min()) >= 0 and float(images.max()) <= 1 and bool(torch.isfinite(images).all())


def test_seed_decides_everything() -> None:
    assert torch.equal(dead_leaves(5, seed=3), dead_leaves(5, seed=3))
    assert not torch.equal(dead_leaves(5, seed=3), dead_leaves(5, seed=4))
    images = dead_leaves(5, seed=3)
    assert torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(9).min() > 1  # five different images


def test_global_random_state_is_neither_read_nor_changed() -> None:
    before = torch.get_rng_state()
    dead_leaves(2)
    assert torch.equal(before, torch.get_rng_state())


def test_colours_are_spread_like_photographs() -> None:
    images = dead_leaves(300)
    flat = images.permute(1, 0, 2, 3).flatten(1)
    assert torch.all((flat.mean(1) - 0.46).abs() < 0.05)
    assert torch.all((flat.std(1) > 0.12) & (flat.std(1) < 0.3))
    correlation = torch.corrcoef(flat)
    assert correlation[0, 1] > 0.75 and correlation[0, 2] > 0.7  # natural images: 0.8 to 0.95


def test_spectrum_falls_as_that_of_natural_images() -> None:
    images = dead_leaves(200, (64, 64), 1)
    power = torch.fft.fft2(images[:, 0] - images.mean()).abs().square().mean(0)
    frequency = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.fftfreq(64)[None, :])
    band = (frequency > 2 / 64) & (frequency < 0.4)
    x, y = frequency[band].log(), power[band].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -3.4 < slope < -1.6  # 1/f^2 in power, as photographs


def test_edges_are_sharp_but_few() -> None:
    steps = dead_leaves(100, (32, 32), 1).diff(dim=3).abs()
    assert 0.05 < float((steps > 0.1).float().mean()) < 0.3
    assert float(steps.median()) < 0.03  # most neighbours lie on the same leaf


def test_tens_of_images_at_full_size_are_quick() -> None:
    started = time.process_time()
    dead_leaves(1000, (32, 32))
    assert time.process_time() - started < 4  # about 1 s; the bound leaves room for slow machines


def test_nonsense_is_refused() -> None:
    for arguments in ((0,), (1, (0, 4)), (1, (4, 4), 0)):
        with pytest.raises(SharefoldError, match="at least 1"):
            dead_leaves(*arguments)
