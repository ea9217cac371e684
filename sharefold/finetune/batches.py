"""Training and validation batches whose content depends on (seed, epoch, step) alone.

Three sources: images in memory (augmented a batch at a time on the device), data sets read a sample at a time by loader
processes, and a user's DataLoader with a sampler of its own. All start at any step of any epoch, and the first two deal
each process its slice of one global order, so that resuming and adding processes change nothing but the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from sharefold.data import ArrayDataset, FileDataset, Preprocess
from sharefold.data.inputs_dataset import InputsDataset
from sharefold.data.preprocess import Size
from sharefold.errors import SharefoldError
from sharefold.finetune import seeds
from sharefold.finetune.augmentation import Augment, sent
from sharefold.finetune.layout import channels_last
from sharefold.inputs import Input, taken

Batch = tuple[Input, Tensor]  # images (B, C, H, W) float32, or several inputs; labels (B,) int64 (-1: none) or (B, classes) float
Data = Any  # a DATA string, (images, labels), images, a Dataset, a DataLoader


class TrainBatches(Protocol):
    """Batches of one run; each update takes ``accumulate`` of them."""

    images: int
    steps: int  # updates an epoch
    batch_size: int  # images an update sees, over all processes

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch, from update ``start`` on."""
        ...

    def expect(self, classes: int) -> None:
        """Checks that labels, of batches yet to come as well, are those of a network with ``classes`` classes."""
        ...


@dataclass(frozen=True)
class Deal:
    """How the images of an epoch are dealt: to updates, to the slices of an update, to processes."""

    images: int
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    size: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        parts = self.accumulate * self.size
        if self.batch_size % parts:
            near = max(parts, self.batch_size // parts * parts)
            raise SharefoldError(
                f"finetune: batch_size={self.batch_size}: must divide into {self.size} processes x {self.accumulate} "
                f"slices: use {near}"
            )
        if self.images < self.batch_size:
            raise SharefoldError(
                f"finetune: batch_size={self.batch_size}: there are {self.images} training images: use at most "
                f"{max(1, self.images // parts * parts)}"
            )

    @property
    def steps(self) -> int:
        return self.images // self.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[int, slice, Tensor]]:
        """(update, this process's window in one slice of its batch, indices of the whole batch)."""
        order = torch.randperm(self.images, generator=seeds.generator("order", self.seed, number))
        own = self.batch_size // self.accumulate // self.size
        for step in range(start, self.steps):
            for part in range(self.accumulate):
                first = (part * self.size + self.rank) * own
                yield step, slice(first, first + own), order[step * self.batch_size : (step + 1) * self.batch_size]


class _Labelled:
    """Batches that check their labels once it is known how many classes the network has."""

    classes: int | None = None
    device: torch.device

    def expect(self, classes: int) -> None:
        """From now on labels are those of a network with ``classes`` classes.

        Raises:
            SharefoldError: of what is in memory, others are. Also from taking batches.
        """
        self.classes = classes

    def _to_device(self, batches: Any) -> Iterator[Batch]:
        for batch in batches:
            given, labels = batch[:2] if isinstance(batch, (tuple, list)) else (batch, None)
            images = taken(given, "finetune")
            if labels is None:
                labels = torch.full((len(images),), -1)
            if self.classes is not None:
                check_labels(labels, self.classes)
            if labels.ndim == 2:
                labels = labels.float()
            # Copied: augmentations write into them, and a loader may hand out what it keeps.
            yield images.to(self.device, non_blocking=True, copy=True), labels.to(self.device, non_blocking=True)


def check_labels(labels: Tensor, classes: int) -> None:
    """Checks labels (n,), or (n, classes) for shares of classes.

    Raises:
        SharefoldError: a network with ``classes`` classes has no such one.
    """
    if labels.ndim == 2:
        if labels.shape[1] != classes:
            raise SharefoldError(f"finetune: the labels are for {labels.shape[1]} classes, the model has {classes}")
    elif labels.numel() and not labels.is_floating_point():
        least, most = int(labels.min()), int(labels.max())
        if least < 0:
            raise SharefoldError(f"finetune: a label is {least}: images need a class from 0 to {classes - 1}")
        if most >= classes:
            raise SharefoldError(
                f"finetune: labels go up to {most}, the model has {classes} classes: wrong data for this model, or --num-classes"
            )


class MemoryBatches(_Labelled):
    """Images held on the device, uint8 or already normalised float (N, H, W, C), augmented a batch at a time."""

    def __init__(
        self, images: Tensor, labels: Tensor, deal: Deal, augment: Augment, normalize: Normalize | None,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.pixels, self.labels = images.contiguous().to(device), labels.to(device)
        self.deal, self.augment, self.normalize = deal, augment, normalize
        self.images, self.steps, self.batch_size = deal.images, deal.steps, deal.batch_size

    def expect(self, classes: int) -> None:
        check_labels(self.labels, classes)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        for step, window, order in self.deal.epoch(number, start):
            random = seeds.generator("augment", self.deal.seed, number, step)
            draw = self.augment.draw(len(order), random).part(window)
            index = sent(order[window], self.pixels.device)
            images = self.augment.apply(self.pixels, index, draw)
            images = images.float() if self.normalize is None else self.normalize.scaled(images)
            images = self.augment.warp(images.permute(0, 3, 1, 2), draw)
            yield (images if self.normalize is None else self.normalize(images)), self.labels[index]


class Normalize:
    """uint8 pixels to 0..1 (:meth:`scaled`), and (x - mean) / std on (B, C, H, W)."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    @staticmethod
    def scaled(pixels: Tensor) -> Tensor:
        return pixels.float().div_(255)

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class _SeededSamples(Dataset):
    """A data set asked for (index, seed): the generators are set before a sample is made and given back after."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        with seeds.seeded(key[1]):
            return self.dataset[key[0]]


class SampleBatches(_Labelled):
    """A map-style data set read by loader processes; the seed of each sample is that of its place in the order."""

    def __init__(
        self, dataset: Dataset, deal: Deal, device: torch.device, workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.deal, self.device = dataset, deal, device
        self.workers, self.collate = workers, collate
        self.images, self.steps, self.batch_size = deal.images, deal.steps, deal.batch_size

    def _keys(self, number: int, start: int) -> Iterator[list[tuple[int, int]]]:
        for step, window, order in self.deal.epoch(number, start):
            base = seeds.mixed("sample", self.deal.seed, number, step)
            yield [(int(index), base + window.start + i) for i, index in enumerate(order[window])]

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        loader = DataLoader(
            _SeededSamples(self.dataset), batch_sampler=list(self._keys(number, start)), num_workers=self.workers,
            collate_fn=self.collate, pin_memory=self.device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip
        yield from self._to_device(loader)


class LoaderBatches(_Labelled):
    """A user's loader with a sampler of its own: taken as it comes, its start found by skipping batches.

    Its order is the sampler's business: seeded before each pass and each batch, so that a resumed run draws what the whole
    one did, but not dealt over processes (a DistributedSampler does that, and is told the epoch).
    """

    def __init__(self, loader: DataLoader, seed: int, accumulate: int, size: int, device: torch.device) -> None:
        self.loader, self.seed, self.accumulate, self.device = loader, seed, accumulate, device
        batches = len(loader)
        if batches < accumulate:
            raise SharefoldError(f"finetune: accumulate={accumulate}: the loader has only {batches} batches an epoch")
        self.steps = batches // accumulate
        self.batch_size = (loader.batch_size or 1) * accumulate * size
        self.images = self.steps * self.batch_size

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        samplers: list[Any] = [self.loader.sampler, self.loader.batch_sampler]
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(number)
        yield from self._to_device(islice(self._seeded(number), start * self.accumulate, None))

    def _seeded(self, number: int) -> Iterator[Any]:
        with seeds.seeded(seeds.mixed("order", self.seed, number)):
            batches = iter(self.loader)
        for index in count():
            with seeds.seeded(seeds.mixed("order", self.seed, number, index)):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class EvalBatches(_Labelled):
    """Batches of this process's share of the validation images, in order, the last one short."""

    def __init__(self, source: MemoryImages | Dataset | DataLoader, batch: int, workers: int, rank: int, size: int,
                 device: torch.device) -> None:  # fmt: skip
        self.source, self.batch, self.workers, self.device = source, batch, workers, device
        self.rank, self.size = rank, size

    def expect(self, classes: int) -> None:
        self.classes = classes
        if isinstance(self.source, MemoryImages):
            check_labels(self.source.labels, classes)

    def __iter__(self) -> Iterator[Batch]:
        source = self.source
        if isinstance(source, MemoryImages):
            own = torch.arange(self.rank, len(source.pixels), self.size)
            for index in own.split(self.batch):
                yield source.batch(index, self.device)
            return
        if isinstance(source, DataLoader):
            dataset, collate, workers = source.dataset, source.collate_fn, source.num_workers
            if self.size == 1 or isinstance(dataset, IterableDataset):
                yield from self._to_device(source)
                return
        else:
            dataset, collate, workers = source, None, self.workers
        own_samples = list(range(self.rank, len(dataset), self.size))  # type: ignore[arg-type]
        loader = DataLoader(torch.utils.data.Subset(dataset, own_samples), self.batch, num_workers=workers,
                            collate_fn=collate)  # fmt: skip
        yield from self._to_device(loader)


@dataclass
class MemoryImages:
    """Images in memory, (N, H, W, C) uint8 or normalised float, and labels (N,) or (N, classes)."""

    pixels: Tensor
    labels: Tensor
    preprocess: Preprocess | None  # None: the pixels are normalised already, or nothing has been said yet
    labelled: bool = True

    @property
    def size(self) -> Size:
        """(C, H, W) of an image."""
        _, height, width, channels = self.pixels.shape
        return channels, height, width

    def batch(self, index: Tensor, device: torch.device) -> Batch:
        pixels = self.pixels[index]
        if self.preprocess is None:
            images = pixels.permute(0, 3, 1, 2).float().to(device)
        else:
            images = self.preprocess.batch(pixels).to(device)
        return images, self.labels[index].to(device)

    @classmethod
    def read(cls, images: Any, labels: Any, model: nn.Module, channels: int) -> MemoryImages:
        """From uint8 or float images (N, C, H, W), (N, H, W, C) or (N, H, W) for ``model``, and labels or None.

        ``channels`` is as of :func:`sharefold.finetune.layout.channels_last`.

        Raises SharefoldError when the shapes are no images or the labels do not match them.
        """
        pixels = torch.as_tensor(images)
        if pixels.ndim not in (3, 4) or not (pixels.dtype == torch.uint8 or pixels.is_floating_point()):
            raise SharefoldError(
                f"finetune: images: {pixels.dtype} of shape {tuple(pixels.shape)}: want uint8 or float, "
                "N x C x H x W or N x H x W x C, or a Dataset for other inputs"
            )
        pixels = pixels.unsqueeze(-1) if pixels.ndim == 3 else channels_last(pixels, model, channels)
        if labels is None:
            target = torch.full((len(pixels),), -1)
        else:
            target = torch.as_tensor(labels)
            target = target.float() if target.ndim == 2 else target.reshape(-1).long()
        if len(target) != len(pixels):
            raise SharefoldError(f"finetune: {len(pixels)} images but {len(target)} labels: the two must agree")
        return cls(pixels, target, None, labels is not None)


def has_own_sampler(loader: DataLoader) -> bool:
    """Whether a loader's order is more than in sequence or shuffled, so that it must be taken as it comes."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return True
    return not isinstance(loader.sampler, (RandomSampler, SequentialSampler))


def memory_images(data: Data, preprocess: Preprocess) -> MemoryImages | None:
    """The images of ``data`` if they are in memory and need no resizing, else None.

    Args:
        preprocess: for images in memory that a user gave, which are taken at their own size.
    """
    if isinstance(data, MemoryImages):
        return replace(data, preprocess=preprocess if data.pixels.dtype == torch.uint8 else None)
    if isinstance(data, ArrayDataset) and data.image_shape == data.preprocess.size:
        return MemoryImages(data.images, data.labels, data.preprocess)
    return None


def labelled(data: Data) -> bool:
    """Whether the data says that it has labels; a foreign data set is taken to have them."""
    return data.labelled if isinstance(data, (MemoryImages, ArrayDataset, FileDataset, InputsDataset)) else True
