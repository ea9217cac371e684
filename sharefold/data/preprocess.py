"""From stored pixels to the tensor a network was trained on, by a timm-style ``pretrained_cfg``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sharefold.data.image_files import in_mode
from sharefold.errors import SharefoldError
from sharefold.untrusted import is_number, shown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Size = tuple[int, int, int]
LARGEST_SIDE, MOST_CHANNELS = 1 << 16, 4096
MOST_VALUES = 3 * 4096 * 4096  # of an image: 200 MB as float32
LEAST_CROP, MOST_CROP = 0.1, 16.0  # crop_pct: an image is first resized to the size over it
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
SIZES = f"from 1 to {LARGEST_SIDE} (C to {MOST_CHANNELS}), together at most {MOST_VALUES:,} values"


def is_size(size: Sequence[int]) -> bool:
    """Whether whole numbers C, H, W are the size of an image that a network may ask for."""
    return (len(size) == 3 and min(size) >= 1 and max(size) <= LARGEST_SIDE and size[0] <= MOST_CHANNELS
            and math.prod(size) <= MOST_VALUES)  # fmt: skip


def parse_size(size: Sequence[int] | int | str, channels: int = 3) -> Size:
    """``"3,32,32"``, ``"32"``, ``32`` or a sequence as (C, H, W); one number means a square, two mean H, W."""
    if isinstance(size, str):
        try:
            numbers = [int(part) for part in size.replace("x", ",").split(",")]
        except ValueError:
            raise SharefoldError(f"input size {size!r}: want C,H,W in whole numbers, e.g. 3,32,32") from None
    else:
        try:
            numbers = [size] if isinstance(size, int) else [int(part) for part in size]
        except (TypeError, ValueError, OverflowError):
            raise SharefoldError(f"input size {shown(size)}: want C,H,W in whole numbers, e.g. 3,32,32") from None
    if len(numbers) == 1:
        numbers = [channels, numbers[0], numbers[0]]
    elif len(numbers) == 2:
        numbers = [channels, *numbers]
    if not is_size(numbers):
        raise SharefoldError(f"input size {shown(size)}: want C,H,W {SIZES}, e.g. 3,32,32")
    return numbers[0], numbers[1], numbers[2]


def _per_channel(name: str, values: Sequence[float] | float, channels: int, averaged: bool) -> tuple[float, ...]:
    try:
        numbers = (float(values),) if isinstance(values, (int, float)) else tuple(float(v) for v in values)
    except (TypeError, ValueError, OverflowError):
        raise SharefoldError(f"{name} {shown(values)}: want numbers, one a channel, e.g. 0.485,0.456,0.406") from None
    if not all(math.isfinite(number) for number in numbers):
        raise SharefoldError(f"{name} {shown(values)}: every value must be a finite number")
    if len(numbers) == 1:
        return numbers * channels
    if channels == 1 and len(numbers) == 3:  # a colour recipe on a grey model: timm sums the stem over its inputs
        return (sum(numbers) / 3,)
    if averaged and numbers and len(numbers) != channels:
        return (sum(numbers) / len(numbers),) * channels
    if len(numbers) != channels:
        raise SharefoldError(f"{name} has {len(numbers)} values, the model has {channels} channels: they must agree")
    return numbers


def _resizing(cfg: Mapping[str, Any]) -> tuple[str, float, str]:
    """Interpolation, crop_pct and crop_mode."""
    interpolation, mode = (str(cfg.get(key) or usual) for key, usual in (("interpolation", "bicubic"), ("crop_mode", "center")))
    for key, value, known in (("interpolation", interpolation, INTERPOLATIONS), ("crop_mode", mode, CROP_MODES)):
        if value not in known:
            raise SharefoldError(f"{key} {shown(value)}: known are {', '.join(known)}")
    crop: Any = cfg.get("crop_pct") or 0.875
    if not is_number(crop) or not LEAST_CROP <= crop <= MOST_CROP:
        raise SharefoldError(f"crop_pct {shown(crop)}: want a number from {LEAST_CROP} to {MOST_CROP:g}")
    return interpolation, float(crop), mode


@dataclass(frozen=True)
class Preprocess:
    """Evaluation-time preprocessing: resize, centre crop, scale to [0, 1], normalise.

    An image that already has the model's size is only normalised, so that small images (CIFAR) are never
    blown up and cropped, and array and file versions of one data set agree.
    """

    size: Size = (3, 224, 224)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_cfg(
        cls,
        cfg: Mapping[str, Any] | None,
        *,
        input_size: Sequence[int] | int | str | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        averaged: bool = False,
    ) -> Preprocess:
        """Read ``{input_size, mean, std, interpolation, crop_pct, crop_mode}``; the keywords override.

        Missing keys take ImageNet's usual values. Where mean and std of ``cfg`` are of another number of channels, their average
        is every channel's if ``averaged`` says so, else they are refused.

        Raises:
            SharefoldError: a size that is no size, a mean or std whose length is not the channel count, std <= 0, a way to
                resize that there is not.
        """
        cfg = cfg or {}
        own = parse_size(cfg.get("input_size") or cls.size)
        size = own if input_size is None else parse_size(input_size, channels=own[0])
        means, stds = (
            _per_channel(name, (cfg.get(name) or usual) if given is None else given, size[0], averaged and given is None)
            for name, given, usual in (("mean", mean, IMAGENET_MEAN), ("std", std, IMAGENET_STD))
        )
        if min(stds) <= 0:
            raise SharefoldError(f"std {stds}: every value must be above 0")
        return cls(size, means, stds, *_resizing(cfg))

    @property
    def cfg(self) -> dict[str, Any]:
        """The same as a timm-style dict."""
        return {
            "input_size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    @property
    def whole(self) -> Preprocess:
        """The same with nothing cut off: what belongs to the whole picture (masks, boxes) still fits after it."""
        return replace(self, crop_pct=1.0, crop_mode="squash")

    @cached_property
    def _timm_transform(self) -> Any:
        from timm.data import create_transform

        return create_transform(
            input_size=self.size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )

    def normalize(self, images: Tensor) -> Tensor:
        """(n, C, H, W) in [0, 1], or uint8, to normalised float32 of the same shape."""
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        if images.dtype == torch.uint8:
            mean, std = mean * 255, std * 255
        return (images.float() - mean).div_(std)

    def image(self, image: Image.Image) -> Tensor:
        """One PIL image to a normalised float32 tensor (C, H, W); colour mode is converted to the channel count.

        Raises:
            SharefoldError: a model of other than 1 or 3 channels, or grey of 32 bits or of floats.
        """
        channels, height, width = self.size
        modes = {1: "L", 3: "RGB"}
        if channels not in modes:
            raise SharefoldError(f"image files give 1 or 3 channels, the model wants {channels}: use npz: instead")
        image = in_mode(image, modes[channels])
        if image.size == (width, height):
            pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(height, width, channels))
            return self.normalize(pixels.permute(2, 0, 1).unsqueeze(0))[0]
        return self._timm_transform(image)

    def batch(self, images: Tensor) -> Tensor:
        """uint8 (n, h, w, C) to normalised float32 (n, C, H, W); whole batches at once when the size already fits."""
        channels, height, width = self.size
        if images.shape[3] != channels:
            raise SharefoldError(
                f"images are {shape_text((images.shape[3], *images.shape[1:3]))}, the model wants "
                f"{shape_text(self.size)}: the channel counts must agree"
            )
        if tuple(images.shape[1:3]) == (height, width):
            return self.normalize(images.permute(0, 3, 1, 2).contiguous())
        arrays = images.squeeze(3).numpy() if channels == 1 else images.numpy()
        return torch.stack([self.image(Image.fromarray(array)) for array in arrays])


def shape_text(shape: Sequence[int]) -> str:
    """``3x32x32``."""
    return "x".join(str(int(part)) for part in shape)
