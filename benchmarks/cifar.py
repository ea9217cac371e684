"""CIFAR-10 and public weights for the benchmarks: a folder with sprites, named by SHAREFOLD_DATA.

    $SHAREFOLD_DATA/cifar10/{train,test}_NN.webp    1,000 images a sprite, 25 rows of 40 tiles of 32 x 32, lossless (or in
                                                    another format that Pillow reads, by the name's end)
    $SHAREFOLD_DATA/cifar10/{train,test}_labels.npy
    $SHAREFOLD_DATA/weights/*.th                     public checkpoints

    python benchmarks/cifar.py cifar10.npz      # the same images as a file for `npz:cifar10.npz`
"""

from __future__ import annotations

import argparse
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}


def data_folder() -> Path:
    """The folder that SHAREFOLD_DATA names."""
    folder = os.environ.get("SHAREFOLD_DATA")
    if not folder or not (Path(folder) / "cifar10").is_dir():
        raise SystemExit("set SHAREFOLD_DATA to a folder that holds cifar10/ and weights/")
    return Path(folder).resolve()


def read_split(folder: Path, split: str, sprites: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) of the first ``sprites`` sprites of a split."""
    tiles = []
    # Of a sprite in two formats the first by name alone, else images would be doubled beside their labels.
    paths = {path.stem: path for path in sorted((folder / "cifar10").glob(f"{split}_[0-9]*.*"), reverse=True)}
    for path in sorted(paths.values())[:sprites]:
        sheet = np.asarray(Image.open(path).convert("RGB"))
        tiles.append(sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3))
    images = np.concatenate(tiles)
    return images, np.load(folder / "cifar10" / f"{split}_labels.npy")[: len(images)]


def write_npz(folder: Path, out: Path, train_sprites: int | None = None, test_sprites: int | None = None) -> Path:
    """A file that DATA ``npz:FILE`` reads."""
    train_x, train_y = read_split(folder, "train", train_sprites)
    test_x, test_y = read_split(folder, "test", test_sprites)
    np.savez(out, train_x=train_x, train_y=train_y, test_x=test_x, test_y=test_y)
    return out


def hardware() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": name, "cores": cores, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    print(write_npz(data_folder(), parser.parse_args().out))
