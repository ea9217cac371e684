"""``KIND:PLACE`` to a data set. One small function a kind; nothing is downloaded and nothing is unpickled here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from sharefold.data.class_names import joined_classes
from sharefold.data.datasets import ArrayDataset, FileDataset, ForeignDataset, ForeignStream
from sharefold.data.image_files import SUFFIXES, forbid_ghostscript, loaded_image
from sharefold.data.npz_files import NpzFile
from sharefold.data.preprocess import Preprocess, shape_text
from sharefold.data.tensor_files import is_tensors
from sharefold.errors import SharefoldError
from sharefold.untrusted import expanded, first_line, printable

# What a split may be called in the data, best first.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "val", "validation", "valid"),
    "val": ("val", "validation", "valid", "test"),
}
_CANONICAL = {"training": "train", "validation": "val", "valid": "val", "eval": "test", "testing": "test"}
HINT = "use imagefolder:DIR, npz:FILE, tensors:FILE, cifar10:DIR, cifar100:DIR, fashionmnist:DIR, timm:NAME or digits"


def split_names(split: str) -> tuple[str, ...]:
    """The names under which ``split`` is looked for, best first."""
    canonical = _CANONICAL.get(split, split)
    return SPLITS.get(canonical, (split,))


def open_data(
    spec: str,
    split: str = "test",
    *,
    transform_cfg: Mapping[str, Any] | Preprocess | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    input_size: Sequence[int] | int | str | None = None,
) -> Dataset:
    """Open the data set named by ``spec``; items are (image (C, H, W) float32 normalised, label int).

    Args:
        spec: ``KIND:PLACE``, see :mod:`sharefold.data`.
        split: ``train``, ``test`` or ``val`` (test and val stand in for each other), or a name used in the data.
        transform_cfg: the model's ``pretrained_cfg``, or a ready :class:`Preprocess`.
        mean, std, input_size: override the configuration.

    Raises:
        SharefoldError: unknown kind, nothing there, wrong layout, dtype or channel count.
    """
    if isinstance(transform_cfg, Preprocess):
        transform_cfg = transform_cfg.cfg
    preprocess = Preprocess.from_cfg(transform_cfg, input_size=input_size, mean=mean, std=std)
    dataset = open_stored(spec, split, preprocess)
    if isinstance(dataset, ArrayDataset) and dataset.image_shape[0] != preprocess.size[0]:
        raise SharefoldError(
            f"data {spec}: images are {shape_text(dataset.image_shape)}, the model wants "
            f"{shape_text(preprocess.size)}: the channel counts must agree"
        )
    return dataset


def open_stored(spec: str, split: str, preprocess: Preprocess) -> Dataset:
    """:func:`open_data` without the check of stored images against the model."""
    kind, _, place = spec.partition(":")
    if is_tensors(spec):
        raise SharefoldError(f"data {spec}: which of them is which input the network says: read_tensors(spec).of(network)")
    opener = _OPENERS.get(kind)
    if opener is None:
        raise SharefoldError(f"data {spec!r}: unknown kind {kind!r}: {HINT}")
    if not place and kind != "digits":
        raise SharefoldError(f"data {spec!r}: a place must follow the colon: {HINT}")
    dataset = opener(place, split, preprocess)
    if isinstance(dataset, Sized) and len(dataset) == 0:
        raise SharefoldError(f"data {spec}: the {split} split holds no images")
    return dataset


def _npz(place: str, split: str, preprocess: Preprocess) -> Dataset:
    path = expanded(place)
    if not path.is_file():
        raise SharefoldError(f"data npz:{place}: no such file")
    archive = NpzFile(path, f"data npz:{place}")
    names = archive.entries
    prefix = next((f"{name}_" for name in split_names(split) if f"{name}_x" in names), "" if "x" in names else None)
    if prefix is None:
        found = ", ".join(sorted(names)) or "nothing"
        raise SharefoldError(f"data npz:{place}: no {split_names(split)[0]}_x in it (it holds {found})")
    images = archive.read(f"{prefix}x")
    labels = archive.read(f"{prefix}y") if f"{prefix}y" in names else None
    where = f"data npz:{place}: {prefix}x"
    if images.ndim not in (3, 4) or images.dtype != np.uint8:
        raise SharefoldError(f"{where} is {images.dtype} of shape {images.shape}: want uint8, N x H x W x C")
    if min(images.shape[1:]) < 1:
        raise SharefoldError(f"{where} has shape {images.shape}: images have at least one pixel")
    channels = preprocess.size[0]
    if images.ndim == 4 and images.shape[3] != channels and images.shape[1] == channels:
        raise SharefoldError(f"{where} has shape {images.shape}, channels first: transpose it to N x H x W x C")
    if labels is not None and not np.issubdtype(labels.dtype, np.integer):
        raise SharefoldError(f"data npz:{place}: {prefix}y is {labels.dtype}: want whole-number class labels")
    if labels is None or labels.ndim < 3:
        return ArrayDataset(images, labels, preprocess)
    dataset = ArrayDataset(images, None, preprocess)  # masks or images are no classes: see truth.py
    dataset.answers = labels
    return dataset


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _other_splits(folder: Path, within: Path) -> list[Path]:
    """The folders of other splits beside that of one, which may be ``within`` the data or what the user named."""
    known = dict.fromkeys(name for names in SPLITS.values() for name in names)
    place = Path(os.path.abspath(folder))  # links stay: the other splits lie beside the link
    if folder == within and place.name not in known:
        return []
    others = [place.parent / name for name in known if name != place.name]
    return [other for other in others if other.is_dir()]


def _imagefolder(place: str, split: str, preprocess: Preprocess) -> Dataset:
    root = expanded(place)
    if not root.is_dir():
        raise SharefoldError(f"data imagefolder:{place}: no such directory")
    folder = next((root / name for name in split_names(split) if (root / name).is_dir()), None)
    if folder is None:
        others = [name for names in SPLITS.values() for name in names if (root / name).is_dir()]
        if others:
            found = ", ".join(dict.fromkeys(others))
            raise SharefoldError(f"data imagefolder:{place}: no {split} folder in it (it has {found})")
        folder = root
    own = _folders(folder)
    classes = joined_classes(own, [_folders(other) for other in _other_splits(folder, within=root)])
    files: list[Path] = []
    labels: list[int] = []
    for name in own:
        found_here = _image_files(folder / name)
        files += found_here
        labels += [classes.index(name)] * len(found_here)
    if files:
        return FileDataset(files, labels, preprocess, classes=classes)
    files = _image_files(folder)
    if not files:
        raise SharefoldError(f"data imagefolder:{place}: no images under {folder}")
    return FileDataset(files, None, preprocess)


def _torchvision(name: str, inner: str) -> Callable[[str, str, Preprocess], Dataset]:
    def open_it(place: str, split: str, preprocess: Preprocess) -> Dataset:
        import torchvision

        root = expanded(place)
        if root.name == inner.split("/")[0] and root.is_dir():  # the user named the inner folder
            root = root.parent
        if not root.is_dir():
            raise SharefoldError(f"data {name.lower()}:{place}: no such directory")
        train = split_names(split)[0] == "train"
        try:
            stored = getattr(torchvision.datasets, name)(root=str(root), train=train, download=False)
        except RuntimeError as error:
            raise SharefoldError(
                f"data {name.lower()}:{place}: no complete {name} in it (nothing is downloaded): "
                f"unpack the published archive so that {root / inner} exists"
            ) from error
        except Exception as error:  # torchvision reads raw files as they come, with whatever that raises
            reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
            raise SharefoldError(f"data {name.lower()}:{place}: {root / inner} is damaged ({reason}): unpack it again") from error
        return ArrayDataset(stored.data, np.asarray(stored.targets), preprocess, classes=stored.classes)

    return open_it


def _timm(place: str, split: str, preprocess: Preprocess) -> Dataset:
    from timm.data import create_dataset

    name, _, options = place.partition(":")
    keywords: dict[str, Any] = {"root": None}
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if not equals:
            raise SharefoldError(f"data timm:{place}: {option!r} is not of the form key=value")
        keywords[key] = {"true": True, "false": False}.get(value.lower(), value)
    if not name.lower().startswith("tfds/"):  # tensorflow decodes into 8 bits by itself
        keywords.setdefault("input_img_mode", None)  # Pillow's conversion, which timm runs, cuts deep pixels off: `in_mode`
    forbid_ghostscript()
    wanted = {"test": "validation", "val": "validation"}.get(split_names(split)[0], split)
    try:
        dataset = create_dataset(name, split=keywords.pop("split", wanted), **keywords)
    except Exception as error:  # timm's readers raise anything, from AssertionError to network errors
        raise SharefoldError(f"data timm:{place}: timm could not open it ({first_line(error)})") from error
    dataset.transform = preprocess.image
    if hasattr(dataset, "loader"):  # torchvision's data sets of files, which convert as they open
        dataset.loader = loaded_image
    where = f"data timm:{place}"
    return ForeignStream(dataset, where) if isinstance(dataset, IterableDataset) else ForeignDataset(dataset, where)


def _digits(place: str, split: str, preprocess: Preprocess) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SharefoldError("data digits: scikit-learn is missing: pip install 'sharefold[demo]'") from error
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    # The file has no split of its own: a fixed fifth, drawn once, is the test set.
    order = np.random.default_rng(0).permutation(len(images))
    cut = len(images) // 5
    chosen = order[cut:] if split_names(split)[0] == "train" else order[:cut]
    return ArrayDataset(images[chosen], bunch.target[chosen], preprocess, classes=[str(d) for d in range(10)])


_OPENERS: dict[str, Callable[[str, str, Preprocess], Dataset]] = {
    "imagefolder": _imagefolder,
    "npz": _npz,
    "cifar10": _torchvision("CIFAR10", "cifar-10-batches-py"),
    "cifar100": _torchvision("CIFAR100", "cifar-100-python"),
    "fashionmnist": _torchvision("FashionMNIST", "FashionMNIST/raw"),
    "timm": _timm,
    "digits": _digits,
}
