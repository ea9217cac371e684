"""Public checkpoints in the forms in which their authors published them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sharefold.sources import open_source

pytestmark = pytest.mark.realdata


@pytest.mark.parametrize(
    ("file", "base", "parameters", "extras"),
    [
        ("resnet20-12fca82f.th", ("resnet20_cifar", {"num_classes": 10}), 269_722, "best_prec1"),
        ("resnet56-4bfd9763.th", ("resnet56_cifar", {"num_classes": 10}), 853_018, "best_prec1"),
        (
            "cifar10-lru14-ckpt-08934.t7",
            ("lrunet", {"reuse": 14, "width": 1, "num_classes": 10}),
            206_282,
            "acc",
        ),
    ],
)
def test_public_file(
    shared_data: Path, file: str, base: tuple[str, dict[str, int]], parameters: int, extras: str
) -> None:
    source = open_source(shared_data / "weights" / file)
    assert source.base == {"library": "timm", "name": base[0], "kwargs": base[1]}
    assert sum(p.numel() for p in source.model.parameters()) == parameters
    assert source.meta["unwrapped"][-1] == "module." and source.meta["others"] == [] and source.meta["absent"] == []
    folder = shared_data / "cifar10"
    sprite = np.asarray(Image.open(folder / "test_00.webp").convert("RGB"))  # 25 rows of 40 images
    images = sprite.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3)
    labels = np.load(folder / "test_labels.npy")[:1000]
    cfg = source.pretrained_cfg
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.inference_mode():
        accuracy = 100 * (source.model(x).argmax(1).numpy() == labels).mean()
    # 1,000 of the 10,000 images: the stored accuracy within three standard errors.
    assert accuracy == pytest.approx(source.meta["extras"][extras], abs=3.0)
