"""Calibration images: a few hundred inputs without labels, from anywhere, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sharefold.data.datasets import ArrayDataset
from sharefold.data.preprocess import Preprocess, shape_text
from sharefold.data.specs import open_stored
from sharefold.errors import SharefoldError
from sharefold.procedural import dead_leaves

PROCEDURAL = "procedural"


def calibration_images(
    source: str | Tensor | Iterable[Any] | None,
    cfg: Mapping[str, Any] | Preprocess | None = None,
    count: int = 1000,
    seed: int = 0,
    split: str = "train",
    *,
    resize: bool = False,
) -> Tensor:
    """At most ``count`` normalised images, float32 (n, C, H, W). Labels are never read.

    Args:
        source: a data spec (a seeded random subset is drawn); a tensor, either normalised float (n, C, H, W) or
            uint8 (n, C, H, W); a data set or loader of images or (image, ...) tuples (the first ``count``);
            None or ``"procedural"`` for dead-leaves images (:mod:`sharefold.procedural`).
        cfg: the model's ``pretrained_cfg``.
        count: how many at most.
        seed: of the subset, or of the procedural images.
        split: which split of a data spec.
        resize: let images of another size be resized. Off by default: stored arrays of a wrong size are more
            often the wrong file than a wish. Image files are always resized and cropped.

    Raises:
        SharefoldError: nothing there, wrong size, channel count or dtype, values that are not finite.
    """
    if count < 1:
        raise SharefoldError(f"calibration: {count} images asked for: at least 1 is needed")
    preprocess = cfg if isinstance(cfg, Preprocess) else Preprocess.from_cfg(cfg)
    channels, height, width = preprocess.size
    if source is None or (isinstance(source, str) and source == PROCEDURAL):
        return preprocess.normalize(dead_leaves(count, (height, width), channels, seed))
    if isinstance(source, str):
        images = _from_spec(source, preprocess, count, seed, split, resize)
    elif isinstance(source, Tensor):
        images = _from_tensor(source, preprocess, count, seed)
    elif isinstance(source, ArrayDataset):
        images = source.batch(subset(len(source), count, seed))[0]
    else:
        images = _from_iterable(source, count)
    check_images(images, preprocess.size)
    return images


def check_images(images: Tensor, size: tuple[int, int, int]) -> None:
    """One clear line when ``images`` are not finite float (n, C, H, W) of the model's ``size`` (C, H, W)."""
    if images.ndim != 4 or len(images) == 0:
        raise SharefoldError(f"calibration images have shape {tuple(images.shape)}: want (n, C, H, W) with n >= 1")
    _check_shape(tuple(images.shape[1:]), size)
    if not torch.isfinite(images).all():
        raise SharefoldError("calibration images hold NaN or infinite values: check mean, std and the stored pixels")


def _check_shape(found: tuple[int, ...], size: tuple[int, int, int]) -> None:
    if tuple(found) == tuple(size):
        return
    if found[0] != size[0]:
        fix = f"give images with {size[0]} channel{'s' if size[0] > 1 else ''}, or none for procedural ones"
    else:
        fix = "give images of that size, say --input-size to run the model at theirs, or --calib-resize"
    raise SharefoldError(f"calibration images are {shape_text(found)}, the model wants {shape_text(size)}: {fix}")


def subset(total: int, count: int, seed: int) -> Tensor:
    """Indices of ``count`` of ``total`` samples, in order; of all where there are no more."""
    if total <= count:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def _from_spec(spec: str, preprocess: Preprocess, count: int, seed: int, split: str, resize: bool) -> Tensor:
    dataset = open_stored(spec, split, preprocess)
    if isinstance(dataset, ArrayDataset):
        if not resize or dataset.image_shape[0] != preprocess.size[0]:
            _check_shape(dataset.image_shape, preprocess.size)
        return dataset.batch(subset(len(dataset), count, seed))[0]
    if isinstance(dataset, Sized):
        chosen = subset(len(dataset), count, seed)
        return torch.stack([dataset[int(index)][0] for index in chosen])
    return _from_iterable(DataLoader(dataset, batch_size=1), count)


def _from_tensor(images: Tensor, preprocess: Preprocess, count: int, seed: int) -> Tensor:
    if images.ndim != 4:
        raise SharefoldError(f"calibration images have shape {tuple(images.shape)}: want (n, C, H, W)")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise SharefoldError(f"calibration images are {images.dtype}: want normalised float, or uint8")
    _check_shape(tuple(images.shape[1:]), preprocess.size)
    images = images[subset(len(images), count, seed)] if len(images) > count else images
    return preprocess.normalize(images) if images.dtype == torch.uint8 else images.float()


def _from_iterable(source: Iterable[Any], count: int) -> Tensor:
    batches: list[Tensor] = []
    have = 0
    for item in source:
        images = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(images, Tensor):
            raise SharefoldError(f"calibration source gave a {type(images).__name__}: want image tensors")
        images = images.unsqueeze(0) if images.ndim == 3 else images
        batches.append(images[: count - have].float())
        have += len(batches[-1])
        if have >= count:
            break
    if not batches:
        raise SharefoldError("calibration source gave no images")
    shapes = {tuple(batch.shape[1:]) for batch in batches}
    if len(shapes) > 1:
        raise SharefoldError(f"calibration images differ in size: {', '.join(shape_text(s) for s in sorted(shapes))}")
    return torch.cat(batches)
