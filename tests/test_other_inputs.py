"""Networks whose input is brought into the shape of their convolutions on the way: vectors, frames side by side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import reported
from networks import Block
from torch import Tensor, nn

import sharefold
from sharefold.data.views import random_views
from sharefold.errors import SharefoldError
from sharefold.measure import count_parameters


class Frames(nn.Module):
    """Frames of sound (n, 64), as pitch trackers take them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, (7, 1), (2, 1))
        self.body = nn.Sequential(*[Block(16) for _ in range(3)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(self.body(self.stem(x[:, None, :, None])).mean((2, 3))))


class Generator(nn.Module):
    """Images of latent vectors (n, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16 * 16)
        self.body = nn.Sequential(*[Block(16) for _ in range(3)])
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.last(self.body(self.first(z).view(-1, 16, 4, 4))))


class Clips(nn.Module):
    """Clips of frames (n, T, C, H, W), each frame an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Sequential(*[Block(16) for _ in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, clip: Tensor) -> Tensor:
        maps = self.body(self.stem(clip.flatten(0, 1))).mean((2, 3))
        return self.head(maps.unflatten(0, clip.shape[:2]).mean(1))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(24, 24), nn.ReLU())], nn.Linear(24, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


SHAPES: dict[type[nn.Module], tuple[int, ...]] = {Frames: (64,), Generator: (8,), Clips: (3, 3, 10, 10), Perceptron: (24,)}


def made(kind: type[nn.Module], count: int = 240) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = kind().eval()
    return net, torch.randn(count, *SHAPES[kind], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", SHAPES)
def test_half_of_the_parameters_and_the_same_file(kind: type[nn.Module], tmp_path: Path) -> None:
    net, samples = made(kind)
    cal = sharefold.calibrate(net, samples)
    small = copy.deepcopy(net)
    done = sharefold.convert_(small, sharefold.plan(net, "50%", cal), cal, refine=2)
    assert count_parameters(small) <= count_parameters(net) / 2
    assert done.report_images == 50 and len(done.outputs) == 1 and done.outputs[0].interval is not None
    new = torch.randn(64, *SHAPES[kind], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = net(new), small(new)
    spread = (wanted - wanted.mean(0)).square().mean()
    assert (found - wanted).square().mean() < 0.6 * spread  # random weights keep little at half of them, but not nothing
    sharefold.save(small, tmp_path / "net.safetensors")
    again = sharefold.load(tmp_path / "net.safetensors", model=kind())
    with torch.no_grad():
        assert torch.allclose(again.eval()(new), found, atol=1e-5)


def test_vectors_have_no_views_that_would_stand_for_new_ones() -> None:
    net, samples = made(Perceptron)
    cal = sharefold.calibrate(net, samples)
    assert len(cal.decide_views) == len(cal.parts.decide)
    small = copy.deepcopy(net)
    done = sharefold.convert_(small, sharefold.plan(net, "50%", cal), cal)
    assert done.agreement_interval is not None and done.new_agreement is None and not done.seen_before


def test_views_of_vectors_are_blends() -> None:
    vectors = torch.eye(40)
    views = random_views(vectors, torch.Generator().manual_seed(0), mix=1.0)
    assert views.shape == vectors.shape and torch.allclose(views.sum(1), torch.ones(40))
    assert (views.diagonal() >= 0.5).all() and (views != vectors).any()
    assert torch.equal(random_views(vectors, torch.Generator().manual_seed(0), mix=0.0), vectors)


@pytest.mark.parametrize("shape", [(30,), (30, 65), (1, 64, 1, 1, 1), (16, 3, 10, 10, 1)])
def test_what_the_network_fails_on_is_refused(shape: tuple[int, ...]) -> None:
    net = made(Frames)[0] if len(shape) != 5 else made(Clips)[0]
    before = copy.deepcopy(net.state_dict())
    if shape == (30, 65):  # any length will do for a network that takes the mean over time
        assert sharefold.calibrate(net, torch.randn(shape)).images.shape == shape
        return
    with pytest.raises(SharefoldError, match="is no float tensor of images"):
        sharefold.calibrate(net, torch.randn(shape))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_one_image_is_not_taken_for_a_batch_of_vectors() -> None:
    class Unbatched(nn.Module):  # a Conv1d takes (C, L) for one signal
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    with pytest.raises(SharefoldError, match="is no float tensor of signals"):
        sharefold.calibrate(Unbatched(), torch.randn(2, 50))


def test_the_command_line_takes_vectors(tmp_path: Path) -> None:
    net, samples = made(Frames)
    torch.save(net.state_dict(), tmp_path / "frames.pt")
    np.savez(tmp_path / "frames.npz", x=samples.numpy())
    own: tuple[Any, ...] = ("--arch", f"{Path(__file__)}:Frames")
    data = f"tensors:{tmp_path / 'frames.npz'}"
    result = reported("convert", tmp_path / "frames.pt", *own, "--calib", data, "--budget", "50%", "-o", tmp_path / "out")
    assert result["params"]["after"] <= result["params"]["before"] / 2 and result["outputs"][0]["metric"] == "decisions"
    found = reported("eval", tmp_path / "out", *own, "--against", tmp_path / "frames.pt", "--data", data)
    assert found["images"] == 240
