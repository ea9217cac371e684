"""Public CIFAR-10 weights load unchanged and give their published accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import sharefold.models  # noqa: F401  (registers the networks)
from sharefold.models._base import unwrap_checkpoint
from sharefold.models.lrunet import unroll_lrunet

pytestmark = pytest.mark.realdata


def find(folder: Path, name: str) -> Path:
    """``folder`` may be the data folder itself or its parent."""
    return next(path for path in (folder / name, folder / "data" / name) if path.exists())


def read_test_images(folder: Path, sprites: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``sprites`` thousand test images, (N, 3, H, W) in [0, 1], and labels (N,).

    A sprite holds 1,000 images as 25 rows of 40 tiles, row by row.
    """
    tiles = []
    for number in range(sprites):
        sprite = np.asarray(Image.open(find(folder, f"cifar10/test_{number:02d}.webp")).convert("RGB"))
        tiles.append(sprite.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3))
    images = torch.from_numpy(np.concatenate(tiles)).permute(0, 3, 1, 2).float() / 255
    labels = np.load(find(folder, "cifar10/test_labels.npy"))[: len(images)]
    return images, torch.from_numpy(labels.astype(np.int64))


@pytest.fixture(scope="module")
def first_thousand(shared_data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return read_test_images(shared_data, 1)


def load(name: str, path: Path) -> torch.nn.Module:
    model = timm.create_model(name)
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(unwrap_checkpoint(state), strict=True)
    return model.eval()


@torch.inference_mode()
def correct(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    guesses = torch.cat([model((batch - mean) / std).argmax(1) for batch in images.split(250)])
    return int((guesses == labels).sum())


FILES = {
    "resnet20_cifar": "weights/resnet20-12fca82f.th",
    "resnet56_cifar": "weights/resnet56-4bfd9763.th",
    "lrunet": "weights/cifar10-lru14-ckpt-08934.t7",
}


@pytest.mark.parametrize(("name", "expected"), [("resnet20_cifar", 915), ("resnet56_cifar", 926), ("lrunet", 899)])
def test_first_thousand(
    name: str, expected: int, shared_data: Path, first_thousand: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Correct answers on the first 1,000 test images, a quick stand-in for the full test below."""
    assert abs(correct(load(name, find(shared_data, FILES[name])), *first_thousand) - expected) <= 1


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [("resnet20_cifar", 91.73, 0.011), ("resnet56_cifar", 93.39, 0.011), ("lrunet", 89.34, 0.1)],
)
def test_published_accuracy(name: str, published: float, tolerance: float, shared_data: Path) -> None:
    """Top-1 in percent on all 10,000 test images; about three minutes on one core."""
    images, labels = read_test_images(shared_data, 10)
    accuracy = 100 * correct(load(name, find(shared_data, FILES[name])), images, labels) / len(labels)
    assert abs(accuracy - published) <= tolerance


def test_unrolled_checkpoint_has_identical_logits(
    shared_data: Path, first_thousand: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model = load("lrunet", find(shared_data, FILES["lrunet"]))
    batch = first_thousand[0][:64]
    with torch.inference_mode():
        assert torch.equal(unroll_lrunet(model)(batch), model(batch))


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 7}, {"in_chans": 1}])
@pytest.mark.parametrize("name", ["resnet20_cifar", "lrunet"])
def test_timm_reads_the_public_files(name: str, kwargs: dict[str, int], shared_data: Path) -> None:
    """``pretrained=True`` takes the files as they are; a fresh classifier or fewer input channels adapt as usual."""
    overlay = {"file": str(find(shared_data, FILES[name]))}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    original = load(name, find(shared_data, FILES[name])).state_dict()
    adapted = {key for key, value in model.state_dict().items() if not torch.equal(value, original[key])}
    classifier, stem = model.pretrained_cfg["classifier"], model.pretrained_cfg["first_conv"]
    expected = {f"{classifier}.weight", f"{classifier}.bias"} if "num_classes" in kwargs else set()
    assert adapted == (expected | {f"{stem}.weight"} if "in_chans" in kwargs else expected)
