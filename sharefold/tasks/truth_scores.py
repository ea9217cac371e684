"""Masks, images and detections against the truth, by torchmetrics: mIoU and pixel accuracy, PSNR and SSIM, mAP.

Two optional packages are imported here and nowhere else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sharefold.data.coco import Objects
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.outputs.figures import MOST_DB
from sharefold.outputs.intervals import bootstrap
from sharefold.tasks.detections import Found

VOID = 255  # pixels of this number count for nothing, as in Pascal VOC, Cityscapes and ADE20K
SMALLEST_SSIM = 11  # pixels of a side: the width of its window


@dataclass(frozen=True)
class TruthFigure:
    """How right a network is.

    Attributes:
        metric: ``miou`` and ``pixel_accuracy``, ``psnr`` and ``ssim``, ``map`` and ``map50``.
        value: a share of 1, of psnr dB.
        interval: 95 %, from a bootstrap over images; None where there is none that is honest: mAP ranks the boxes of all images
            together, and one image says nothing of others.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"metric": self.metric, "value": self.value, "interval": None if self.interval is None else list(self.interval)}

    def text(self) -> str:
        """``71.20% (69.85% to 72.60%)``."""
        low_high = "" if self.interval is None else " ({} to {})".format(*map(self._number, self.interval))
        return f"{self._number(self.value)}{low_high}"

    def _number(self, value: float) -> str:
        if self.metric == "psnr":
            return f"{value:.2f} dB"
        return f"{value:.4f}" if self.metric == "ssim" else f"{value:.2%}"


@dataclass(frozen=True)
class Part:
    """The figure of one class or category.

    Attributes:
        id: its number.
        name: in the annotation file; "" where masks give none.
        metric: ``iou`` or ``map``.
        value: a share of 1.
    """

    id: int
    name: str
    metric: str
    value: float


def check_installed() -> None:
    """Checks before any network runs that the packages are there.

    Raises:
        SharefoldError: they are not.
    """
    _metrics("functional.classification")
    _metrics("detection")


def _metrics(part: str) -> ModuleType:
    from importlib import import_module

    try:
        import_module("faster_coco_eval")
        return import_module(f"torchmetrics.{part}")
    except ImportError as error:
        package = (error.name or "torchmetrics").split(".")[0]
        raise SharefoldError(f"figures against the truth need {package}: pip install 'sharefold[metrics]'") from None


class MaskScores:
    """Counts of pixels, image by image.

    Args:
        classes: that the network tells apart.
        counted: their count is known. Where it is not, it is two if the network names no other classes than 0 and 1.

    Masks of two classes may be of 0 and 255: where none of them holds a 1, 255 is class 1 and no void.
    """

    def __init__(self, classes: int, counted: bool = True) -> None:
        self.classes, self.counted = classes, counted
        self._counts: list[Tensor] = []  # (4, classes) an image: right, true, predicted, predicted where the mask has 255

    def add(self, predicted: Tensor, mask: Tensor, where: str) -> None:
        """One picture's classes (h, w), predicted and true, int64.

        Raises:
            SharefoldError: a class that the network has not.
        """
        wrong = (mask != VOID) & ((mask < 0) | (mask >= self.classes))
        if bool(wrong.any()):
            raise SharefoldError(
                f"{where}: its mask holds class {int(mask[wrong][0])}, the network tells {self.classes} apart (0 to "
                f"{self.classes - 1}; {VOID} is void): wrong masks for this network"
            )
        functional, count = _metrics("functional.classification"), self.classes
        mask = torch.where(mask == VOID, count, mask)  # a class of its own until all masks are known
        table = functional.multiclass_confusion_matrix(predicted, mask, count + 1, validate_args=False)[:, :count]
        right, known = table[:count].diagonal(), table[:count]
        self._counts.append(torch.stack([right, known.sum(1), known.sum(0), table[count]]))

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        """
        Raises:
            SharefoldError: no pixel counts.
        """
        counts = self._without_void(torch.stack(self._counts)).double()
        total = counts.sum(0)
        if not bool(total[1].any()):
            raise SharefoldError(f"truth: every pixel of the masks is void ({VOID}): there is nothing to measure by")
        each = _iou(total)
        figures = [TruthFigure(name, float(of(total[None])), bootstrap(counts, of, seed))
                   for name, of in (("miou", _miou), ("pixel_accuracy", _accuracy))]  # fmt: skip
        return figures, [Part(index, "", "iou", float(value)) for index, value in enumerate(each) if not math.isnan(value)]

    def _without_void(self, counts: Tensor) -> Tensor:
        """(images, 3, classes), right, true and predicted, with the pixels of 255 as class 1 or left out."""
        counts, void = counts[:, :3], counts[:, 3]
        two = self.classes == 2 if self.counted else not bool(counts[:, :, 2:].any() or void[:, 2:].any())
        if two and not bool(counts[:, 1, 1].any()):
            counts = counts.clone()
            counts[:, 0, 1], counts[:, 1, 1] = void[:, 1], void.sum(1)
            counts[:, 2] += void
        return counts


def _iou(counts: Tensor) -> Tensor:
    """(..., classes) of (..., 3, classes); NaN of classes that are neither there nor predicted: those do not occur."""
    right, true, predicted = counts.unbind(-2)
    return right / (true + predicted - right)


def _miou(counts: Tensor) -> Tensor:
    return _iou(counts).nanmean(-1)


def _accuracy(counts: Tensor) -> Tensor:
    return counts[..., 0, :].sum(-1) / counts[..., 1, :].sum(-1)


class ImageScores:
    """PSNR and SSIM, a figure an image."""

    def __init__(self) -> None:
        self._psnr: list[Tensor] = []
        self._ssim: list[Tensor] = []

    def add(self, made: Tensor, target: Tensor) -> None:
        """One image (C, h, w) and its target; values beyond [0, 1] are cut off, as they are when an image is saved."""
        functional, pair = _metrics("functional.image"), (made[None].float(), target[None].float())
        psnr = functional.peak_signal_noise_ratio(*pair, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3))
        self._psnr.append(psnr.nan_to_num(nan=0.0, posinf=MOST_DB).clamp(max=MOST_DB).reshape(1))
        if min(target.shape[1:]) >= SMALLEST_SSIM:
            ssim = functional.structural_similarity_index_measure(*pair, data_range=(0.0, 1.0), reduction="none")
            self._ssim.append(ssim.reshape(1))

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        """Means over images; no SSIM where an image is too small for it."""
        found = [TruthFigure("psnr", *_mean(self._psnr, seed))]
        if len(self._ssim) == len(self._psnr):
            found.append(TruthFigure("ssim", *_mean(self._ssim, seed)))
        return found, []


def _mean(values: list[Tensor], seed: int) -> tuple[float, tuple[float, float] | None]:
    each = torch.cat(values)
    return float(each.double().mean()), bootstrap(each, lambda sums: sums.flatten() / len(each), seed)


class BoxScores:
    """mAP as COCO counts it: mean over IoU of 0.5 to 0.95 and over categories.

    Args:
        categories: id -> name.
    """

    def __init__(self, categories: Mapping[int, str]) -> None:
        self.categories = categories
        self._metric = _metrics("detection").MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")
        self._metric.warn_on_many_detections = False
        self._objects, self._crowds, self._said = 0, 0, set[int]()

    def add(self, found: Found, objects: Objects) -> None:
        """One picture's."""
        self._objects += len(objects.boxes)
        self._crowds += int(objects.crowds.sum())
        self._said |= set(found.categories.tolist())
        self._metric.update(
            [{"boxes": found.boxes, "scores": found.scores, "labels": found.categories}],
            [{"boxes": objects.boxes, "labels": objects.categories, "iscrowd": objects.crowds}],
        )

    def figures(self, seed: int) -> tuple[list[TruthFigure], list[Part]]:
        """
        Raises:
            SharefoldError: there are no true objects, or crowds alone.
        """
        if self._objects == self._crowds:
            what = f"only crowds ({self._crowds} with iscrowd 1) are" if self._crowds else "no object is"
            raise SharefoldError(f"truth: {what} annotated in these pictures: there is nothing to find")
        if self._said and not self._said & self.categories.keys():
            said, known = (", ".join(map(str, sorted(ids)[:5])) for ids in (self._said, self.categories))
            warnings.warn(
                f"the network finds classes {said}, the annotation file has {known}: another file, or other numbers, are meant",
                SharefoldWarning,
                stacklevel=2,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self._metric.compute()
        figures = [TruthFigure(name, float(result[key])) for name, key in (("map", "map"), ("map50", "map_50"))]
        pairs = zip(result["classes"].reshape(-1).tolist(), result["map_per_class"].reshape(-1).tolist(), strict=True)
        return figures, [Part(key, self.categories.get(key, ""), "map", value) for key, value in pairs if value >= 0]
