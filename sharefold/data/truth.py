"""What is true of each image where that is no class: masks, target images, objects in boxes.

Masks and boxes belong to the whole picture, so that with truth every picture is resized whole, without a crop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sharefold.data.coco import Annotations, Objects, read_annotations
from sharefold.data.datasets import ArrayDataset, FileDataset
from sharefold.data.image_files import DEEP, SUFFIXES, opened_image
from sharefold.data.same_names import matched
from sharefold.data.specs import split_names
from sharefold.errors import SharefoldError
from sharefold.untrusted import expanded, printable

MASKS, IMAGES, BOXES = "masks", "images", "boxes"
_ONE_NUMBER = ("1", "L", "P", "I", "I;16")  # Pillow's modes of one whole number a pixel
_LOSSY = ("JPEG", "MPO")  # of WebP, the other lossy format, every image is one of colours
_LOSSY_WITHIN = ("jpeg", "tiff_jpeg")  # of TIFF
_CHANNELS = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Answer:
    """What is true of one picture.

    Attributes:
        name: of the picture or of its truth, for messages.
        size: (height, width) of the picture itself.
        value: a mask, int64 (height, width); a target, float32 (C, h, w) in [0, 1]; or :class:`Objects`.
    """

    name: str
    size: tuple[int, int]
    value: Tensor | Objects


class Truth(Protocol):
    """Where masks and targets lie."""

    def name(self, index: int) -> str: ...

    def mask(self, index: int) -> Tensor:
        """int64 (h, w)."""

    def target(self, index: int, channels: int) -> Tensor:
        """float32 (channels, h, w) in [0, 1]."""


class FileTruth:
    """Image files, one a picture."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)

    def name(self, index: int) -> str:
        return printable(str(self.files[index]))

    def mask(self, index: int) -> Tensor:
        """
        Raises:
            SharefoldError: no readable image, one of colours, or one whose format changes numbers.
        """
        with opened_image(self.files[index]) as image:
            if image.format in _LOSSY or image.info.get("compression") in _LOSSY_WITHIN:
                raise SharefoldError(
                    f"{self.name(index)}: JPEG changes the numbers of a mask: save masks anew as PNG, from their source"
                )
            if image.mode not in _ONE_NUMBER:
                raise SharefoldError(
                    f"{self.name(index)}: a mask holds one class number a pixel, grey or as a palette, and this is {image.mode}"
                )
            return torch.from_numpy(np.array(image).astype(np.int64))

    def target(self, index: int, channels: int) -> Tensor:
        """
        Raises:
            SharefoldError: no readable image, one of more than 8 bits a channel, or another count of channels than 1 or 3.
        """
        if channels not in _CHANNELS:
            raise SharefoldError(f"image files give 1 or 3 channels, the network makes {channels}: use npz: instead")
        with opened_image(self.files[index]) as image:
            if image.mode in DEEP:
                raise SharefoldError(f"{self.name(index)}: a target has 8 bits a channel, and this is {image.mode}: convert it")
            pixels = np.array(image.convert(_CHANNELS[channels]), dtype=np.uint8)
        return _unit(pixels)


class StoredTruth:
    """An array in memory, masks (N, H, W) or images (N, H, W, C).

    Args:
        values: of three dimensions at least.
        images: shape of the images that it belongs to.

    Raises:
        SharefoldError: another number of images, or of dimensions.
    """

    def __init__(self, values: np.ndarray, images: Sequence[int]) -> None:
        if values.ndim > 4 or len(values) != images[0]:
            raise SharefoldError(
                f"truth has shape {values.shape}, the images {tuple(images)}: want a mask (N, H, W) or image (N, H, W, C) of each"
            )
        self.values = values

    def name(self, index: int) -> str:
        return f"truth of image {index}"

    def mask(self, index: int) -> Tensor:
        """
        Raises:
            SharefoldError: the array holds images with channels.
        """
        if self.values.ndim != 3:
            raise SharefoldError(f"truth has shape {self.values.shape}: this network makes masks, whose truth is (N, H, W)")
        return torch.from_numpy(self.values[index].astype(np.int64))

    def target(self, index: int, channels: int) -> Tensor:
        """
        Raises:
            SharefoldError: no uint8, or another count of channels.
        """
        values = self.values[index]
        values = values[..., None] if values.ndim == 2 else values
        if values.dtype != np.uint8 or values.shape[2] != channels:
            raise SharefoldError(
                f"truth is {values.dtype} of shape {self.values.shape}: this network makes images of {channels} channels, whose "
                "truth is uint8 (N, H, W, C)"
            )
        return _unit(values)


def _unit(pixels: np.ndarray) -> Tensor:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class Pairs(Dataset):
    """Pictures, resized whole to the network's input, and what is true of them; items are (image (C, H, W), :class:`Answer`).

    Args:
        images: the pictures.
        truth: masks or targets, or the objects of an annotation file.
    """

    def __init__(self, images: FileDataset | ArrayDataset, truth: Truth | Annotations) -> None:
        self.images = copy.copy(images)
        self.images.preprocess = self.preprocess = images.preprocess.whole
        self.truth = truth
        self._value: Callable[[int, tuple[int, int]], Tensor | Objects] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def of(self, task: str, channels: int = 3) -> Pairs:
        """The same with the answers of a task.

        Args:
            task: "masks", "images" or "boxes".
            channels: of the images that the network makes.
        """
        pairs, truth = copy.copy(self), self.truth
        if isinstance(truth, Annotations):
            pairs._value = truth.objects
        else:
            pairs._value = _Mask(truth) if task == MASKS else _Target(truth, channels)
        return pairs

    def __getitem__(self, index: int) -> tuple[Tensor, Answer]:
        if self._value is None:
            raise SharefoldError("truth: of which task? take pairs.of(task)")
        if isinstance(self.images, ArrayDataset):
            image, size, name = self.images[index][0], self.images.image_shape[1:], f"image {index}"
        else:
            (image, size), name = self.images.with_size(index), str(self.images.files[index])
        return image, Answer(printable(name), size, self._value(index, size))


@dataclass(frozen=True)
class _Mask:
    truth: Truth

    def __call__(self, index: int, size: tuple[int, int]) -> Tensor:
        mask = self.truth.mask(index)
        if tuple(mask.shape) != size:
            raise SharefoldError(
                f"{self.truth.name(index)}: the mask is {mask.shape[1]}x{mask.shape[0]} pixels, its picture {size[1]}x{size[0]}: "
                "they must be of one size"
            )
        return mask


@dataclass(frozen=True)
class _Target:
    truth: Truth
    channels: int

    def __call__(self, index: int, size: tuple[int, int]) -> Tensor:
        return self.truth.target(index, self.channels)


def with_truth(dataset: Dataset, place: str | Path | None = None, split: str = "test") -> Pairs:
    """Pictures with what is true of them.

    Args:
        dataset: as :func:`sharefold.data.open_data` gives it; it is left as it is.
        place: a folder of masks or target images named as the pictures are (the suffix may differ), or within it a folder of
            ``split``; or a COCO annotation file (.json). None for what an npz file holds beside its images: ``{split}_y`` of
            whole numbers (N, H, W) for masks, uint8 (N, H, W, C) for images.
        split: which part of the data.

    Raises:
        SharefoldError: nothing there, pictures without names, a picture without truth or that is its own, an annotation file of
            another form.
    """
    if place is None:
        if not isinstance(dataset, ArrayDataset) or dataset.answers is None:
            raise SharefoldError("truth: the data holds no masks or images beside its images: give --truth FOLDER or FILE.json")
        return Pairs(dataset, StoredTruth(dataset.answers, dataset.images.shape))
    where = f"truth {printable(str(place))}"
    if not isinstance(dataset, FileDataset):
        raise SharefoldError(f"{where}: it goes by the names of the pictures, which these data have not: give imagefolder:DIR")
    root = expanded(str(place))
    if root.is_dir():
        folder = next((root / name for name in split_names(split) if (root / name).is_dir()), root)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        order = matched(dataset.files, files, lambda path: path.stem, where)
        found = [files[index] for index in order]
        for picture, file in zip(dataset.files, found, strict=True):
            if file.resolve() == picture.resolve():
                raise SharefoldError(f"{where}: {printable(str(file))} is the picture itself: give the folder of its truth")
        return Pairs(dataset, FileTruth(found))
    if root.suffix.lower() != ".json":
        problem = "neither a folder nor a .json file" if root.exists() else "no such folder or file"
        raise SharefoldError(f"{where}: {problem}: want a folder of masks or images, or a COCO annotation file")
    return Pairs(dataset, read_annotations(root, dataset.files))
