"""From what the user hands in as ``train`` and ``val`` to batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sharefold.data import ArrayDataset, FileDataset, InputsDataset, Preprocess, is_tensors, open_data, read_tensors
from sharefold.data.datasets import ForeignDataset
from sharefold.data.image_files import in_mode, opened_image
from sharefold.data.preprocess import Size, parse_size
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.finetune.augmentation import Augment
from sharefold.finetune.batches import (
    Data,
    Deal,
    EvalBatches,
    LoaderBatches,
    MemoryBatches,
    MemoryImages,
    Normalize,
    SampleBatches,
    TrainBatches,
    has_own_sampler,
    labelled,
    memory_images,
)
from sharefold.finetune.config import FinetuneConfig
from sharefold.finetune.distributed import World
from sharefold.format import carried_config
from sharefold.inputs import Inputs


def preprocess_of(model: nn.Module, config: FinetuneConfig, size: Size | None = None) -> Preprocess:
    """The model's own preprocessing (timm's ``pretrained_cfg``), with the configuration's mean and std on top.

    Args:
        size: (C, H, W) of the images, by default what the model says.
    """
    return Preprocess.from_cfg(
        _cfg_of(model), input_size=size, mean=config.mean or None, std=config.std or None, averaged=size is not None
    )


def _cfg_of(model: nn.Module) -> Mapping[str, Any]:
    config_of_file = carried_config(model)
    cfg = (config_of_file and config_of_file.pretrained_cfg) or getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else getattr(cfg, "to_dict", dict)()


def in_memory(data: Data, model: nn.Module) -> Data:
    """``data``, as :class:`MemoryImages` if it is images, or (images, labels), in memory: taken at the size that they have."""
    images, labels = (data, None) if isinstance(data, Tensor) else (None, None)
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        images, labels = data
    if images is None:
        return data
    return MemoryImages.read(images, labels, model, parse_size(_cfg_of(model).get("input_size") or Preprocess.size)[0])


def opened(data: Data, split: str, preprocess: Preprocess, model: nn.Module) -> Data:
    """``data``, opened for ``model`` where it is a DATA string; several inputs in memory, ((a, b), labels or None), as a data
    set."""
    if isinstance(data, str) and is_tensors(data):
        return read_tensors(data).of(model)
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], (tuple, list)):
        return InputsDataset(Inputs(data[0], "finetune"), data[1])
    return open_data(data, split, transform_cfg=preprocess) if isinstance(data, str) else data


def ready(
    data: Data, split: str, model: nn.Module, config: FinetuneConfig, size: Size | None = None
) -> tuple[Data, Preprocess]:  # fmt: skip
    """``data`` in memory or opened, and the preprocessing that it is for; what is ready stays as it is.

    Args:
        size: (C, H, W) at which a DATA string is opened; by default the model's.
    """
    data = in_memory(data, model)
    preprocess = preprocess_of(model, config, data.size if isinstance(data, MemoryImages) else size)
    return opened(data, split, preprocess, model), preprocess


def warn_about_teacher(model: nn.Module, teacher: nn.Module, config: FinetuneConfig, size: Size | None = None) -> None:
    """Warns when the teacher was trained on other pixels than the model will see: both get the same batches.

    Images in memory, of ``size``, are what the user gave to both.
    """
    if not hasattr(teacher, "pretrained_cfg"):
        return
    own, other = preprocess_of(model, config, size), preprocess_of(teacher, FinetuneConfig(), size)
    for name in ("size", "mean", "std"):
        if getattr(own, name) != getattr(other, name):
            warnings.warn(
                f"finetune: the teacher expects images of {name} {getattr(other, name)}, the model gets "
                f"{getattr(own, name)}: the teacher may be less accurate than it could be",
                SharefoldWarning,
                stacklevel=4,
            )


def limited(data: Dataset, count: int) -> Dataset:
    """``count`` samples of a data set, evenly spaced (files lie sorted by class)."""
    total = len(data)  # type: ignore[arg-type]
    if count >= total:
        return data
    index = torch.arange(count) * total // count
    if isinstance(data, ArrayDataset):
        labels = data.labels[index] if data.labelled else None
        return ArrayDataset(data.images[index], labels, data.preprocess, classes=data.classes)
    if isinstance(data, FileDataset):
        files, tags = [data.files[i] for i in index], [data.labels[i] for i in index]
        return FileDataset(files, tags if data.labelled else None, data.preprocess, classes=data.classes)
    if isinstance(data, InputsDataset):
        inputs, labels = data.batch(index)
        return InputsDataset(inputs, labels if data.labelled else None)
    return torch.utils.data.Subset(data, index.tolist())


class TrainImages(Dataset):
    """Stored images of an :class:`ArrayDataset` or :class:`FileDataset` under timm's training transform."""

    def __init__(self, data: ArrayDataset | FileDataset, transform: Any) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        mode = _mode(self.data.preprocess)
        if isinstance(self.data, ArrayDataset):
            pixels = self.data.images[index].numpy()
            image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
            return self.transform(image.convert(mode)), int(self.data.labels[index])
        path = self.data.files[index]
        with opened_image(path) as image:
            return self.transform(in_mode(image, mode)), self.data.labels[index]


@dataclass(frozen=True)
class InMode:
    """``transform`` of images in Pillow's ``mode``, whatever theirs is; a class, so that it reaches worker processes."""

    mode: str
    transform: Any

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(in_mode(image, self.mode))


def _mode(preprocess: Preprocess) -> str:
    return "L" if preprocess.size[0] == 1 else "RGB"


def train_transform(preprocess: Preprocess, config: FinetuneConfig, small: bool) -> Any:
    """PIL image to normalised tensor: padded crop (small images) or random resized crop, flip, AutoAugment policy.

    Raises:
        SharefoldError: a policy that timm does not know.
    """
    try:
        return _train_transform(preprocess, config, small)
    except (AssertionError, KeyError, ValueError) as error:
        if not config.auto_augment:
            raise
        raise SharefoldError(
            f"finetune: auto_augment={config.auto_augment!r} is no policy that timm knows ({error!r}): "
            "write for example rand-m9-mstd0.5-inc1"
        ) from None


def _train_transform(preprocess: Preprocess, config: FinetuneConfig, small: bool) -> Any:
    from timm.data import create_transform
    from timm.data.auto_augment import rand_augment_transform
    from torchvision import transforms

    size, side = preprocess.size, preprocess.size[1]
    chain = chain_for(config, side, size[0])
    if not small:
        options: dict[str, Any] = {"auto_augment": config.auto_augment or None, "color_jitter": None}
        return create_transform(
            input_size=size, is_training=True, mean=preprocess.mean, std=preprocess.std, hflip=0.5 * chain.flip,
            interpolation=preprocess.interpolation, **options,
        )  # fmt: skip
    steps = [
        transforms.Resize(size[1:]),
        transforms.RandomCrop(size[1:], padding=chain.crop, padding_mode="reflect" if chain.reflect else "constant"),
        transforms.RandomHorizontalFlip(0.5 * chain.flip),
    ]
    if config.auto_augment:
        grey = tuple(round(255 * m) for m in preprocess.mean)
        steps.append(rand_augment_transform(config.auto_augment, {"img_mean": grey, "translate_const": side // 3}))
    steps += [transforms.ToTensor(), transforms.Normalize(preprocess.mean, preprocess.std)]
    return transforms.Compose(steps)


def chain_for(config: FinetuneConfig, side: int, channels: int) -> Augment:
    """The batch augmentation: as told, or for ``auto`` a padded crop by an eighth of the side, and a flip.

    Grey images are not flipped unasked: they are often digits or letters.
    """
    if config.augment != "auto":
        return Augment.parse(config.augment)
    return Augment(crop=side // 8, flip=channels == 3)


def training_batches(
    data: Data, model: nn.Module, config: FinetuneConfig, world: World, size: Size | None = None
) -> TrainBatches:  # fmt: skip
    """Batches of the training images; ``size`` as of :func:`ready`. Raises SharefoldError for what cannot be used as asked."""
    data, preprocess = ready(data, "train", model, config, size)
    if config.labels and not labelled(data):
        raise SharefoldError("finetune: the training images have no labels: pass labels, or distil with --no-labels")

    def deal(images: int, batch: int = config.batch_size) -> Deal:
        return Deal(images, batch, config.accumulate, world.rank, world.size, config.seed)

    if isinstance(data, DataLoader):
        if has_own_sampler(data):
            return LoaderBatches(data, config.seed, config.accumulate, world.size, world.device)
        batch = (data.batch_size or 1) * world.size * config.accumulate
        return SampleBatches(
            data.dataset, deal(len(data.dataset), batch), world.device, data.num_workers, data.collate_fn  # type: ignore[arg-type]
        )  # fmt: skip
    held = memory_images(data, preprocess)
    if held is not None and not config.auto_augment:
        side, channels = int(held.pixels.shape[1]), int(held.pixels.shape[3])
        own = held.preprocess
        normalize = None if own is None else Normalize(own.mean, own.std, world.device)
        chain = chain_for(config, side, channels)
        return MemoryBatches(held.pixels, held.labels, deal(len(held.pixels)), chain, normalize, world.device)
    if held is not None:
        if held.preprocess is None:
            raise SharefoldError("finetune: auto_augment: needs uint8 images: these are normalised already")
        if held.size[0] not in (1, 3):
            raise SharefoldError(f"finetune: auto_augment: is for 1 or 3 channels, not {held.size[0]}: leave it out")
        data = ArrayDataset(held.pixels, held.labels, held.preprocess)
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise SharefoldError(
            f"finetune: training data {type(data).__name__}: want a DATA string, (images, labels), a map-style Dataset "
            "or a DataLoader"
        )
    if isinstance(data, (ArrayDataset, FileDataset)):
        own = data.preprocess
        small = isinstance(data, ArrayDataset) or max(own.size[1:]) <= 64
        data = TrainImages(data, train_transform(own, config, small))
    elif isinstance(data, ForeignDataset) and isinstance(own := getattr(data.transform, "__self__", None), Preprocess):
        data = data.under(InMode(_mode(own), train_transform(own, config, small=max(own.size[1:]) <= 64)))
    return SampleBatches(data, deal(len(data)), world.device, config.workers)


def validation_batches(
    data: Data, model: nn.Module, config: FinetuneConfig, world: World, size: Size | None = None
) -> EvalBatches:  # fmt: skip
    """Batches of the validation images, dealt over processes; ``size`` as of :func:`ready`."""
    data, preprocess = ready(data, "val", model, config, size)
    if not labelled(data):
        raise SharefoldError("finetune: the validation images have no labels: leave val out, or pass labels")
    source = data if isinstance(data, DataLoader) else (memory_images(data, preprocess) or data)
    batch = max(1, config.batch_size // world.size // config.accumulate)
    return EvalBatches(source, batch, config.workers, world.rank, world.size, world.device)
