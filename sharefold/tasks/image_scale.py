"""On which scale a network makes images: told by what it makes alone, as a scale that is chosen by the targets flatters it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.data.preprocess import Preprocess
from sharefold.errors import SharefoldError
from sharefold.outputs.leaf import BYTES, NORMALISED, SHARES, TANH
from sharefold.running import as_input

# What autograd calls operations that change no value that lies between -1 and 1: crops, orders of axes, copies.
_MOVES = ("Slice", "Select", "Narrow", "Permute", "Transpose", "View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Clone",
          "ToCopy", "PixelShuffle", "Clamp")  # fmt: skip
# The hundredth of the values that lies lowest, and that which lies highest, tell nothing: networks overshoot at edges.
_TAIL = 0.01
# How far below 0 and above 1 images from 0 to 1 may reach, where a network does not cut them off.
_BELOW, _ABOVE = -0.1, 1.5
# Bytes of several images reach further; what stays below may be normalised images without a dark pixel.
_DARK_BYTES = 8.0
_MOST_VALUES = 1 << 20  # that are sorted


@dataclass(frozen=True)
class ImageScale:
    """From what a network makes to [0, 1].

    Attributes:
        name: "1", "255", "tanh" or "normalised".
        gain: (C or 1, 1, 1).
        shift: the same.
        text: for people.
    """

    name: str
    gain: Tensor
    shift: Tensor
    text: str

    def __call__(self, made: Tensor) -> Tensor:
        return made * self.gain + self.shift


def image_scale(made: Tensor, preprocess: Preprocess, said: str = "", tanh: bool = False) -> ImageScale:
    """The scale of images.

    Args:
        made: (n, C, h, w) of the first pictures.
        preprocess: of the pictures, by which normalised images are read.
        said: the user's word, "" for none.
        tanh: the network's last operation is one. If values go below 0 then, they are from -1 to 1.

    Raises:
        SharefoldError: the user says normalised, and the network makes other channels than it takes.
    """
    low, high = _range(made)
    fits = made.shape[1] == preprocess.size[0]
    if said == NORMALISED and not fits:
        raise SharefoldError(
            f"--outputs image:scale={NORMALISED}: the network takes {preprocess.size[0]} channels and makes {made.shape[1]}: "
            "which mean and std are whose cannot be told"
        )
    name = said or (TANH if tanh and low < _BELOW else _told(low, high, preprocess if fits else None))
    why = "given" if said else f"they lie between {low:.3g} and {high:.3g} in the first pictures"
    if name == NORMALISED:
        std, mean = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.std, preprocess.mean))
        return ImageScale(name, std, mean, f"values were read as normalised by the pictures' mean and std ({why})")
    if name == TANH:
        why = why if said else f"the network ends in tanh, and {why}"
        half = torch.full((1, 1, 1), 0.5)
        return ImageScale(name, half, half, f"values were read as -1 to 1 ({why})")
    if not said and low < _BELOW:
        why += "; what lies below 0 is cut off"
    gain = torch.full((1, 1, 1), 1 / 255 if name == BYTES else 1.0)
    return ImageScale(name, gain, torch.zeros(1, 1, 1), f"values were read as 0 to {name} ({why})")


@torch.enable_grad()
def ends_in_tanh(model: nn.Module, images: Tensor, output: Callable[[Any], Tensor]) -> bool:
    """Whether nothing but cuts and moves comes after a tanh, as the gradient would pass it.

    Args:
        images: (n, C, H, W); one is run.
        output: of what the network returns for it.
    """
    image = as_input(model, images[:1]).requires_grad_()
    last = output(model(image.clone())).grad_fn  # a clone may be written into
    while last is not None and last.name().startswith(_MOVES):
        last = last.next_functions[0][0]
    return last is not None and last.name().startswith("Tanh")


def _told(low: float, high: float, preprocess: Preprocess | None) -> str:
    """By the range of the values; ``preprocess`` where images may be normalised by it."""
    if preprocess is not None and (any(preprocess.mean) or any(std != 1 for std in preprocess.std)):
        brightest = max((1 - mean) / std for mean, std in zip(preprocess.mean, preprocess.std, strict=True))
        if low < _BELOW or _ABOVE < high <= min(brightest, _DARK_BYTES):
            return NORMALISED
    return BYTES if high > _ABOVE else SHARES


def _range(made: Tensor) -> tuple[float, float]:
    values = made.float().flatten()
    values = values[:: -(-len(values) // _MOST_VALUES)].sort().values
    out = int(len(values) * _TAIL)
    return float(values[out]), float(values[-1 - out])
