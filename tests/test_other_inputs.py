"""Networks whose input is brought into the shape of their convolutions on the way: vectors, frames side by side."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import call, refused, reported
from networks import Block
from torch import Tensor, nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.measure import count_parameters
from sharefold.repair import refine as module


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


@pytest.mark.parametrize("kind", [Perceptron, Clips])
def test_what_is_brought_into_shape_has_no_views_that_would_stand_for_new_ones(kind: type[nn.Module]) -> None:
    net, samples = made(kind)
    cal = sharefold.calibrate(net, samples)
    assert not cal.has_views and torch.equal(cal.decide_views, cal.decide_images)
    small = copy.deepcopy(net)
    done = sharefold.convert_(small, sharefold.plan(net, "50%", cal), cal)
    assert done.agreement_interval is not None and done.new_agreement is None and not done.seen_before


def test_it_is_learned_from_by_blends_alone() -> None:
    vectors, unknown = torch.eye(40), SimpleNamespace(has_views=False)
    views = module._views(vectors, unknown, 0.5, torch.Generator().manual_seed(0))
    assert views.shape == vectors.shape and torch.allclose(views.sum(1), torch.ones(40))
    assert (views.diagonal() >= 0.5).all() and (views != vectors).any()
    frames = torch.randn(1, 1, 3, 10, 10).expand(8, 4, 3, 10, 10)  # equal clips of equal frames stay as they are
    assert torch.allclose(module._views(frames, unknown, 0.5, torch.Generator().manual_seed(0)), frames, atol=1e-6)


def test_a_network_that_takes_a_mean_over_time_takes_any_length() -> None:
    assert sharefold.calibrate(made(Frames)[0], torch.randn(30, 65)).images.shape == (30, 65)


@pytest.mark.parametrize(
    ("kind", "samples", "words"),
    [
        (Frames, torch.randn(30), "no float tensor of images .*: pass normalised ones"),
        (Frames, torch.randn(30, 4), "no float tensor of images .*, and Frames fails on it .*: pass what it takes"),
        (Clips, torch.randn(16, 3, 10, 10, 1), "and Clips fails on it"),
        (Perceptron, torch.randn(8, 25), "and Perceptron fails on it .*25"),
        (Perceptron, torch.randint(9, (8, 24)), "int64 is no float tensor"),
        (Perceptron, torch.randn(0, 24), "there are no images"),
        (Perceptron, torch.full((8, 24), torch.nan), "NaN or infinity"),
    ],
)
def test_what_the_network_fails_on_is_refused(kind: type[nn.Module], samples: Tensor, words: str) -> None:
    net, _ = made(kind)
    with pytest.raises(SharefoldError, match=words):
        sharefold.calibrate(net, samples)


class Counting(nn.Module):
    """Writes on itself, and draws at random, at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.calls = Perceptron(), 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(x)
        self.last = x + 0 * torch.rand(1)
        return self.body(x)


@pytest.mark.parametrize("width", [24, 23])
def test_trying_a_network_leaves_it_as_it_was(width: int) -> None:
    torch.manual_seed(0)
    net, samples = Counting(), torch.randn(30, width)
    state = torch.get_rng_state()
    if width == 24:
        sharefold.calibrate(net, samples)
    else:
        with pytest.raises(SharefoldError, match="fails on it"):
            sharefold.calibrate(net, samples)
    assert net.calls == 0 and float(net.seen) == 0 and not hasattr(net, "last") and net.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (2, 2), (1, 2)])
def test_a_signal_is_not_taken_for_a_batch_of_vectors(channels: int, count: int) -> None:
    """A Conv1d takes (C, L) for one signal."""
    net = nn.Sequential(nn.Conv1d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, channels, 3, padding=1))
    with pytest.raises(SharefoldError, match="is no float tensor of signals"):
        sharefold.calibrate(net, torch.randn(count, 50))


def test_the_command_line_takes_vectors(tmp_path: Path) -> None:
    net, samples = made(Frames)
    torch.save(net.state_dict(), tmp_path / "frames.pt")
    np.savez(tmp_path / "frames.npz", x=samples.numpy())
    own: tuple[Any, ...] = ("--arch", f"{Path(__file__)}:Frames")
    data = f"tensors:{tmp_path / 'frames.npz'}"
    result = reported("convert", tmp_path / "frames.pt", *own, "--calib", data, "--budget", "50%", "-o", tmp_path / "out")
    assert result["params"]["after"] <= result["params"]["before"] / 2 and result["outputs"][0]["metric"] == "decisions"
    for verb in ("convert", "bench", "export", "inspect"):
        of = tmp_path / ("frames.pt" if verb == "convert" else "out")
        place = {"convert": ["-o", tmp_path / "never"], "export": ["-o", tmp_path / "never.onnx"]}.get(verb, [])
        found = call(verb, of, *own, *place)
        refused(found, "Frames fails on an image of 3x224x224 (")
        assert f"give samples of what it takes as {'--calib' if verb == 'convert' else '--data'} tensors:FILE" in found.stderr
    assert not list(tmp_path.glob("never*"))
    found = reported("eval", tmp_path / "out", *own, "--against", tmp_path / "frames.pt", "--data", data)
    assert found["images"] == 240
