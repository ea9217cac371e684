"""Whether the user's images look as the network's BatchNorms expect, and the look at them that tells twins apart."""

from __future__ import annotations

import warnings
from collections.abc import Sequence, Sized
from typing import TYPE_CHECKING, Any

from sharefold.errors import SharefoldWarning

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from sharefold.data import Preprocess
    from sharefold.sources.twins import Look

PICTURES = 32


def look_at(
    spec: str | None, split: str, seed: int, *, resize: bool = False, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, input_size: str | None = None,
) -> Look | None:  # fmt: skip
    """A look at the data ``spec`` for :func:`sharefold.open_source`; mean, std and input size are what the user
    sets. None without data, and of tensors, which are normalised already."""
    from sharefold.data import is_tensors

    if spec is None or is_tensors(spec):
        return None

    def look(config: dict[str, Any]) -> Tensor:
        from sharefold.data import Preprocess, calibration_images

        preprocess = Preprocess.from_cfg(config, mean=mean, std=std, input_size=input_size)
        return calibration_images(spec, preprocess, PICTURES, seed, split, resize=resize)

    return look


def images_of(dataset: Dataset, preprocess: Preprocess) -> Tensor | None:
    """As many images of a data set, evenly spaced, as preprocessing is judged by; None where it has no length."""
    import torch

    from sharefold.calibration.input_fit import sample_size

    if not isinstance(dataset, Sized):
        return None
    count = min(len(dataset), sample_size(*preprocess.size[1:]))
    return torch.stack([dataset[int(index)][0] for index in torch.linspace(0, len(dataset) - 1, count)])


def input_warning(model: nn.Module, images: Tensor | None, preprocess: Preprocess, own: dict[str, Any]) -> str | None:
    """Warns where the images fit the network's BatchNorms clearly worse than otherwise prepared; gives the text, for JSON.

    Args:
        images: (n, C, H, W) normalised by ``preprocess``.
        own: the network's own ``pretrained_cfg``.
    """
    if images is None:
        return None
    from sharefold.calibration.input_fit import better_setting, setting_of

    found = better_setting(model, images, preprocess.mean, preprocess.std, setting_of(own))
    if found is None:
        return None
    warnings.warn(str(found), SharefoldWarning, stacklevel=2)
    return str(found)
