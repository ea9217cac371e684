"""Which calibration images count."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sharefold.calibration import sample_selection as choice
from sharefold.calibration.sample_selection import least_certain
from sharefold.calibration.statistics import Statistics, statistics_of
from sharefold.graph import analyze
from sharefold.outputs import read_outputs


class Certain(nn.Module):
    """Its logits are the first pixels: an image of 0 is as uncertain as can be."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0]


class Pixels(nn.Module):
    """Logits of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FEWEST", 4)


def graded(count: int) -> Tensor:
    """Image i's logits differ by i: the higher, the more certain."""
    images = torch.zeros(count, 3, 2, 2)
    images[:, 0] = torch.arange(count)[:, None, None].float()
    images[:, 0, 0, 1] = 0
    return images


def test_the_least_certain_half_in_order() -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = least_certain(Certain(), graded(12)[order], batch_size=5)
    assert len(found) == 6 and bool((found.diff() > 0).all())
    assert set(order[found].tolist()) == set(range(6))


@pytest.mark.parametrize(("count", "kept"), [(3, 3), (4, 4), (5, 4), (8, 4), (10, 5)])
def test_never_fewer_than_the_floor(count: int, kept: int) -> None:
    assert len(least_certain(Certain(), graded(count))) == kept


def test_dense_predictions_count_by_their_mean() -> None:
    images = torch.zeros(9, 3, 2, 2)
    images[:, 0] = 9.0
    images[2:6, 0, :, 1] = 0.0  # half of the pixels uncertain
    reading = read_outputs(Pixels(), images, overrides="logits:axis=1")
    assert least_certain(Pixels(), images, reading=reading).tolist() == [2, 3, 4, 5]


def test_without_logits_all_count() -> None:
    assert least_certain(Boxes(), graded(12)).tolist() == list(range(12))


def test_the_mode_of_the_network_comes_back() -> None:
    model = Certain().train()
    least_certain(model, graded(12))
    assert model.training


def test_statistics_are_those_of_the_chosen_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.randn(10, 3, 4, 4) * torch.linspace(0.1, 3, 10)[:, None, None, None]
    graph = analyze(model, images[:1])
    found = statistics_of(model, graph, images)
    assert found.chosen.tolist() == least_certain(model, images).tolist() and len(found.images) == 10
    assert torch.equal(found.sample(3), images[found.chosen[[0, 2, 4]]])
    alone = Statistics(model, images[found.chosen], centered=found.centered)
    assert torch.allclose(found.moments(["0"])["0"], alone.moments(["0"])["0"])
