"""A network on pictures whose truth is known: the one walk over images, whatever the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from sharefold.data.coco import Annotations
from sharefold.data.truth import IMAGES, MASKS, Answer, Pairs
from sharefold.errors import SharefoldError
from sharefold.options import Outputs, chosen
from sharefold.outputs.reading import OutputReading, read_outputs
from sharefold.running import BATCH_ELEMENTS, batch_within, evaluating, run_on
from sharefold.tasks.against_truth import BoxMeasure, ImageMeasure, MaskMeasure, Measure
from sharefold.tasks.task_reading import Task, task_of
from sharefold.tasks.truth_scores import Part, TruthFigure, check_installed

_LOOKED_AT = 4  # images that tell what a network returns


@dataclass(frozen=True)
class TaskOptions:
    """How a network is measured against the truth.

    Attributes:
        outputs: kinds of the network's outputs that would be read wrongly: ``"logits:axis=1"``, ``"binary"``, ``"image"``.
        batch_size: images a batch at most; fewer of large ones.
        limit: only the first so many images.
        workers: processes that load images.
        device: where the network runs; it is moved there.
        seed: of the bootstrap.
    """

    outputs: Outputs = None
    batch_size: int = 250
    limit: int | None = None
    workers: int = 0
    device: torch.device | str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class TaskReport:
    """How right a network is.

    Attributes:
        task: "masks", "images" or "boxes".
        output: name of the output that was measured, as ``inspect`` lists it; "detections" of torchvision's detectors.
        figures: masks: ``miou`` (mean over the classes that are there or predicted) and ``pixel_accuracy``; images: ``psnr``
            (dB, mean over images) and ``ssim``; boxes: ``map`` (IoU of 0.5 to 0.95) and ``map50``.
        parts: the IoU of every class, or the mAP of every category.
        images: how many they are of.
        seconds: how long it took.
    """

    task: str
    output: str
    figures: list[TruthFigure]
    parts: list[Part]
    images: int
    seconds: float

    def __getitem__(self, metric: str) -> float:
        """The value of a figure."""
        return next(figure.value for figure in self.figures if figure.metric == metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": self.task, "output": self.output, "images": self.images, "seconds": self.seconds,
            "figures": [figure.to_dict() for figure in self.figures], "parts": [asdict(part) for part in self.parts],
        }  # fmt: skip


def evaluate_task(
    model: nn.Module,
    pairs: Pairs,
    options: TaskOptions | None = None,
    progress: Callable[[int], None] | None = None,
    **changes: Any,
) -> TaskReport:
    """Measures ``model`` against masks, target images or annotated objects, by torchmetrics (extra ``metrics``).

    What is measured follows from what the network returns:

    - Class logits or probabilities (n, C, h, w), class numbers (n, h, w) or a binary map (n, 1, h, w) by masks. They are resized
      to the mask's size (bilinearly), then decided by. Pixels of 255 are void, or yes where the masks of a binary map hold no 1.
    - Images (n, C, h, w) from 0 to 1, from 0 to 255 or normalised as the pictures were, by target images, which may be larger
      than the pictures.
    - Detections (a dictionary of boxes, labels and scores an image, labels being category ids) or raw boxes (n, 4, anchors)
      beside scores (n, classes, anchors) by an annotation file. Boxes are scaled back to the picture, raw ones after those that
      overlap have gone. Of C raw scores, k is that of the k-th category by id where there are C categories, and that of id k
      where C - 1 is the largest id.

    Args:
        model: any network; in eval mode meanwhile, its modes restored.
        pairs: pictures and their truth, as :func:`sharefold.data.with_truth` gives them.
        options: see :class:`TaskOptions`; ``changes`` replace single fields of it.
        progress: called with the number of images done after each batch.

    Raises:
        SharefoldError: torchmetrics or faster-coco-eval is missing, no output fits the truth, a mask of another size or with
            classes that the network has not, a target that does not fit, a count of scores that is not that of the categories,
            nothing to measure by.
    """
    wanted = chosen(options, changes, TaskOptions)
    check_installed()
    model.to(wanted.device)
    started = time.perf_counter()
    count = min(len(pairs), wanted.limit or len(pairs))
    few = torch.stack([pairs.images[index][0] for index in range(min(count, _LOOKED_AT))])
    reading = read_outputs(model, few, None, wanted.outputs)
    with evaluating(model):
        answers = reading.run(model, few)
        task = task_of(reading, answers, isinstance(pairs.truth, Annotations))
        measure = _measure(task, reading, answers, pairs)
        channels = answers[task.leaves[0]].shape[1] if task.kind == IMAGES else 0
        batch = batch_within(BATCH_ELEMENTS, math.prod(pairs.preprocess.size), wanted.batch_size)
        chosen_pairs: Subset = Subset(pairs.of(task.kind, channels), range(count))
        done = 0
        for images, truths in DataLoader(chosen_pairs, batch, collate_fn=_together, num_workers=wanted.workers):
            measure.add(_said(model, images, reading, task), truths)
            done += len(images)
            if progress is not None:
                progress(done)
    figures, parts = measure.figures(wanted.seed)
    return TaskReport(task.kind, task.output, figures, parts, done, time.perf_counter() - started)


def _measure(task: Task, reading: OutputReading, answers: Sequence[Tensor], pairs: Pairs) -> Measure:
    if task.kind == MASKS:
        return MaskMeasure(reading.leaves[task.leaves[0]], answers[task.leaves[0]])
    if task.kind == IMAGES:
        return ImageMeasure(pairs.preprocess)
    assert isinstance(pairs.truth, Annotations)
    return BoxMeasure([reading.leaves[index] for index in task.leaves], pairs.truth.categories, pairs.preprocess.size[1:])


def _said(model: nn.Module, images: Tensor, reading: OutputReading, task: Task) -> Any:
    """The outputs that are measured; detections as they are."""
    if not task.leaves:
        said = run_on(model, images)
        if len(said) != len(images):
            raise SharefoldError(f"truth: the network returns {len(said)} detections for {len(images)} images: want one each")
        return said
    found = reading.run(model, images)
    return [found[index] for index in task.leaves]


def _together(items: Sequence[tuple[Tensor, Answer]]) -> tuple[Tensor, list[Answer]]:
    return torch.stack([image for image, _ in items]), [answer for _, answer in items]
