"""Two kinds of data set, in memory and on disk, and the loaders over them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sharefold.data.image_files import opened_image
from sharefold.data.inputs_dataset import NO_LABEL, InputsDataset
from sharefold.data.preprocess import Preprocess
from sharefold.errors import SharefoldError
from sharefold.inputs import Input
from sharefold.untrusted import printable


class ArrayDataset(Dataset):
    """All images in memory as uint8, normalised a batch at a time.

    Args:
        images: uint8 (N, H, W, C) or (N, H, W).
        labels: integers (N,), or None for images without labels (they come out as -1).
        preprocess: what the model wants.
        classes: class names, where the source has them.

    Attributes:
        answers: what is true of each image where that is no class: masks (N, H, W) or images (N, H, W, C), of whole numbers.
    """

    answers: np.ndarray | None = None

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor | None,
        preprocess: Preprocess,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        pixels = torch.as_tensor(images)
        self.images = pixels.unsqueeze(3) if pixels.ndim == 3 else pixels
        count = len(self.images)
        self.labelled = labels is not None
        self.labels = (
            torch.full((count,), NO_LABEL, dtype=torch.int64)
            if labels is None
            else torch.as_tensor(labels).reshape(-1).to(torch.int64)
        )
        if len(self.labels) != count:
            raise SharefoldError(f"{count} images but {len(self.labels)} labels: the two must agree")
        self.preprocess = preprocess
        self.classes = list(classes) if classes is not None else None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Stored (C, H, W), before any resizing."""
        _, height, width, channels = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.batch(torch.tensor([index]))
        return images[0], int(labels[0])

    def batch(self, indices: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Normalised images (n, C, H, W) and labels (n,) at ``indices``."""
        return self.preprocess.batch(self.images[indices]), self.labels[indices]


class FileDataset(Dataset):
    """Image files and their labels, decoded on access.

    Args:
        files: paths in a fixed order.
        labels: one a file, or None.
        preprocess: what the model wants.
        classes: class names in label order.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        preprocess: Preprocess,
        *,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.files = list(files)
        self.labelled = labels is not None
        self.labels = [NO_LABEL] * len(self.files) if labels is None else list(labels)
        self.preprocess = preprocess
        self.classes = list(classes) if classes is not None else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.with_size(index)[0], self.labels[index]

    def with_size(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """The image as the model wants it, and (height, width) of the file's."""
        with opened_image(self.files[index]) as image:
            return self.preprocess.image(image), (image.height, image.width)


class _Foreign:
    """A data set that another library reads; what it raises is bad input."""

    def __init__(self, dataset: Any, where: str) -> None:
        self.dataset, self.where = dataset, where

    @property
    def transform(self) -> Any:
        """From a PIL image to a tensor."""
        return self.dataset.transform

    def __len__(self) -> int:
        return len(self.dataset)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except SharefoldError:
            raise
        except Exception as error:
            reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
            raise SharefoldError(f"{self.where}: its images cannot be read ({reason}): repair or remove them") from error


class ForeignDataset(_Foreign, Dataset):
    """One whose items have numbers."""

    def under(self, transform: Any) -> ForeignDataset:
        """The same images under another transform, from a PIL image to a tensor; this data set stays as it is."""
        dataset = copy.copy(self.dataset)
        dataset.transform = transform
        return ForeignDataset(dataset, self.where)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with self._reading():
            return self.dataset[index]


class ForeignStream(_Foreign, IterableDataset):
    """One that gives its items in turn."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        items = iter(self.dataset)
        while True:
            with self._reading():
                item = next(items, None)
            if item is None:
                return
            yield item


class BatchLoader:
    """Batches straight from a data set in memory: no per-sample Python, no worker processes.

    Each pass shuffles anew from ``seed + pass number``; ``set_epoch`` picks the pass, for resuming.
    """

    def __init__(
        self, dataset: ArrayDataset | InputsDataset, batch_size: int, *, shuffle: bool = False, seed: int = 0,
        drop_last: bool = False,
    ) -> None:  # fmt: skip
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (1 if rest and not self.drop_last else 0)

    def __iter__(self) -> Iterator[tuple[Input, Tensor]]:
        order: Tensor | None = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.dataset), generator=generator)
        self.epoch += 1
        for step in range(len(self)):
            window = slice(step * self.batch_size, (step + 1) * self.batch_size)
            yield self.dataset.batch(window if order is None else order[window])


def loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    *,
    drop_last: bool = False,
) -> BatchLoader | DataLoader:
    """Batches of (images (n, C, H, W) float32, labels (n,) int64); of tensors (inputs, labels), several as
    :class:`sharefold.inputs.Inputs`.

    In-memory data sets whose samples need no resizing take the fast path and ignore ``workers``. Order and
    shuffling depend on ``seed`` alone.
    """
    if batch_size < 1:
        raise SharefoldError(f"batch size {batch_size}: must be at least 1")
    if isinstance(dataset, InputsDataset):
        return BatchLoader(dataset, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    if isinstance(dataset, ArrayDataset) and (workers == 0 or dataset.image_shape == dataset.preprocess.size):
        return BatchLoader(dataset, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": workers, "drop_last": drop_last}
    if not isinstance(dataset, IterableDataset):
        options |= {"shuffle": shuffle, "generator": torch.Generator().manual_seed(seed)}
    return DataLoader(dataset, pin_memory=torch.cuda.is_available(), **options)
