"""A network on pictures whose truth is known: the one walk over images, whatever the task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from sharefold.data.coco import Annotations
from sharefold.data.truth import IMAGES, MASKS, Answer, Pairs
from sharefold.errors import SharefoldError
from sharefold.options import Outputs, chosen
from sharefold.outputs import leaf as kinds
from sharefold.outputs.leaf import Leaf
from sharefold.outputs.reading import OutputReading, read_outputs
from sharefold.running import BATCH_ELEMENTS, batch_within, evaluating, random_kept, run_on, usable_device
from sharefold.tasks.against_truth import BoxMeasure, ImageMeasure, MaskMeasure, Measure
from sharefold.tasks.image_scale import ends_in_tanh, image_scale
from sharefold.tasks.task_reading import Task, task_of
from sharefold.tasks.truth_scores import VOID, Part, TruthFigure, check_installed
from sharefold.untrusted import is_int, quoted

_LOOKED_AT = 8  # images that tell what a network returns


@dataclass(frozen=True)
class TaskOptions:
    """How a network is measured against the truth.

    Attributes:
        outputs: kinds of the network's outputs that would be read wrongly: ``"logits:axis=1"``, ``"binary"``,
            ``"image:scale=255"``.
        batch_size: images a batch at most; fewer of large ones.
        limit: only the first so many images.
        workers: processes that load images.
        device: where the network runs; it is moved there.
        seed: of the bootstrap.

    Raises:
        SharefoldError: a count that is no whole number, or too small a one.
    """

    outputs: Outputs = None
    batch_size: int = 250
    limit: int | None = None
    workers: int = 0
    device: torch.device | str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("limit", 1), ("workers", 0)):
            value = getattr(self, name)
            if not (is_int(value) and value >= least) and (name, value) != ("limit", None):
                raise SharefoldError(f"evaluate_task: {name}={quoted(value)}: want a whole number from {least} on")


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
        scale: of images, how their values were read; "" of masks and boxes.
    """

    task: str
    output: str
    figures: list[TruthFigure]
    parts: list[Part]
    images: int
    seconds: float
    scale: str = ""

    def __getitem__(self, metric: str) -> float:
        """The value of a figure."""
        return next(figure.value for figure in self.figures if figure.metric == metric)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "task": self.task, "output": self.output, "images": self.images, "seconds": self.seconds, "scale": self.scale,
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
      to the mask's size (bilinearly), then decided by. Pixels of 255 are void; of a binary map or of two classes they are yes
      (class 1) where no mask holds a 1.
    - Images (n, C, h, w) by target images, which may be larger than the pictures. Their values go from 0 to 1, from 0 to 255,
      from -1 to 1 (of a network that ends in tanh), or are normalised as the pictures were. What the network makes of the
      first pictures tells which; ``outputs`` may say it: ``"image:scale=1"``, ``"image:scale=255"``, ``"image:scale=tanh"``,
      ``"image:scale=normalised"``.
    - Detections (a dictionary of boxes, labels and scores an image, labels being category ids) or raw boxes (n, 4, anchors)
      beside scores (n, classes, anchors) by an annotation file. Boxes are scaled back to the picture, raw ones after those that
      overlap have gone. Where there are as many raw scores as categories, they are in the order of the categories' ids; where
      there is one more than the largest id, score number k (from 0) is of the category with id k.

    Args:
        model: any network; in eval mode meanwhile, its modes restored.
        pairs: pictures and their truth, as :func:`sharefold.data.with_truth` gives them.
        options: see :class:`TaskOptions`; ``changes`` replace single fields of it.
        progress: called with the number of images done after each batch.

    Raises:
        SharefoldError: torchmetrics or faster-coco-eval is missing, no output fits the truth, a mask of another size or with
            classes that the network has not, a target that does not fit, targets that look like masks of an output that looks
            like an image, a count of scores that is not that of the categories, an output of NaN, nothing to measure by, no
            such device here.
    """
    wanted = chosen(options, changes, TaskOptions)
    device = usable_device(wanted.device)
    check_installed()
    model.to(device)
    started = time.perf_counter()
    count = len(pairs) if wanted.limit is None else min(len(pairs), wanted.limit)
    few = torch.stack([pairs.images[index][0] for index in range(min(count, _LOOKED_AT))])
    reading = read_outputs(model, few, None, wanted.outputs)
    with evaluating(model), random_kept(model):
        answers = reading.run(model, few)
        task = task_of(reading, answers, isinstance(pairs.truth, Annotations))
        channels = answers[task.leaves[0]].shape[1] if task.kind == IMAGES else 0
        chosen_pairs: Subset = Subset(pairs.of(task.kind, channels), range(count))
        if channels == 1:
            first = [chosen_pairs[index][1] for index in range(len(few))]
            _check_no_masks(reading.leaves[task.leaves[0]], answers[task.leaves[0]], first)
        measure = _measure(task, reading, answers, pairs, model, few)
        batch = batch_within(BATCH_ELEMENTS, math.prod(pairs.preprocess.size), wanted.batch_size)
        done = 0
        for images, truths in DataLoader(chosen_pairs, batch, collate_fn=_together, num_workers=wanted.workers):
            said = _said(model, images, reading, task)
            _check_numbers(said, truths, task.output)
            measure.add(said, truths)
            done += len(images)
            if progress is not None:
                progress(done)
    figures, parts = measure.figures(wanted.seed)
    scale = measure.scale.text if isinstance(measure, ImageMeasure) else ""
    return TaskReport(task.kind, task.output, figures, parts, done, time.perf_counter() - started, scale)


def _measure(
    task: Task, reading: OutputReading, answers: Sequence[Tensor], pairs: Pairs, model: nn.Module, few: Tensor
) -> Measure:
    if task.kind == MASKS:
        return MaskMeasure(reading.leaves[task.leaves[0]], answers[task.leaves[0]])
    if task.kind == IMAGES:
        place = task.leaves[0]
        leaf, made = reading.leaves[place], answers[place].cpu()
        tanh = not leaf.scale and ends_in_tanh(model, few, lambda said: reading.leaves_in(said, 1)[place])
        return ImageMeasure(pairs.preprocess, image_scale(made, pairs.preprocess, leaf.scale, tanh))
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


def _check_no_masks(leaf: Leaf, made: Tensor, first: Sequence[Answer]) -> None:
    """A map of shares may be a mask as well as a grey image: what is measured would be another thing.

    Raises:
        SharefoldError: the network's one channel was read as an image without the user's word, and the first targets hold no
            other values than a mask of yes and no does.
    """
    if leaf.why == kinds.GIVEN:
        return
    levels = torch.cat([answer.value.unique() for answer in first if isinstance(answer.value, Tensor)]).unique()
    if set((levels * 255).round().int().tolist()) <= {0, 1, VOID}:
        binary = "binary:sigmoid" if _within_0_and_1(made) else "binary"
        raise SharefoldError(
            f"truth: output {leaf.name} has one channel and was read as an image ({leaf.why}), and the first targets hold no "
            f"other values than 0, 1 and {VOID}, as masks do: say which: --outputs {binary} or --outputs image"
        )


def _within_0_and_1(values: Tensor) -> bool:
    return float(values.min()) >= 0 and float(values.max()) <= 1


def _check_numbers(said: Any, answers: Sequence[Answer], output: str) -> None:
    """
    Raises:
        SharefoldError: the network says NaN of a picture.
    """
    detections = isinstance(said[0], Mapping)
    for index, answer in enumerate(answers):
        parts = [said[index][key] for key in ("boxes", "scores")] if detections else [tensor[index] for tensor in said]
        lost = sum(int(part.isnan().sum()) for part in parts)
        if lost:
            raise SharefoldError(
                f"output {output}: {lost} of its values for {answer.name} are NaN (no numbers), so that there is nothing to "
                "measure: look into the network's weights and its --mean and --std"
            )


def _together(items: Sequence[tuple[Tensor, Answer]]) -> tuple[Tensor, list[Answer]]:
    return torch.stack([image for image, _ in items]), [answer for _, answer in items]
