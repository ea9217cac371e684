"""``sharefold eval``: accuracy of any source on any labelled data set, masks, images or boxes against the truth, or what it has
in common with another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sharefold.untrusted import shown

from .common import Run, shared_options
from .input_check import images_of, input_warning, look_at
from .source import SourceOptions, preprocess_options, source_options
from .tensor_input import check_takes_images, tensor_file

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    from sharefold.data import Preprocess
    from sharefold.inputs import Input
    from sharefold.outputs.streamed import Compared
    from sharefold.tasks import TaskReport


@click.command("eval")
@source_options
@click.option("--data", required=True, metavar="DATA", help="npz:FILE, imagefolder:DIR, tensors:FILE, cifar10:DIR ...")
@click.option("--against", metavar="ORIGINAL", help="Compare with this network instead, output by output; needs no labels.")
@click.option("--truth", metavar="PLACE", help="Measure against masks or images in this folder, or a COCO annotation file.")
@click.option("--outputs", metavar="KIND", multiple=True, help="Beside classes, what an output is: logits:axis=1; repeatable.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images a batch.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="N images: the first; with --against, drawn by --seed.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Loader processes.")
@preprocess_options
@shared_options
def command(
    run: Run,
    source: SourceOptions,
    data: str,
    against: str | None,
    truth: str | None,
    outputs: tuple[str, ...],
    split: str,
    batch_size: int,
    limit: int | None,
    workers: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    input_size: str | None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of SOURCE on DATA; with --truth mIoU of masks, PSNR and SSIM of images, mAP of
    boxes; with --against what it has in common with another network: agreement of classes or masks, PSNR of images, boxes found
    again.

    \b
    sharefold eval timm:resnet18 --data imagefolder:/data/imagenet --split val
    sharefold eval resnet20-shared --data npz:cifar10.npz --json
    sharefold eval segmenter-shared --data imagefolder:pictures --truth masks
    sharefold eval yolo-shared --data imagefolder:pictures --truth instances.json
    sharefold eval yolo-shared --against yolo:yolov8n.pt --data imagefolder:pictures
    """
    device = run.setup()
    from sharefold.data import ArrayDataset, Preprocess, loader, open_data, with_truth
    from sharefold.errors import SharefoldError
    from sharefold.inputs import check_count
    from sharefold.measure import evaluate
    from sharefold.outputs.streamed import compared
    from sharefold.running import BATCH_ELEMENTS, batch_of, batch_within
    from sharefold.tasks import TaskOptions, evaluate_task

    if truth is not None and against is not None:
        raise SharefoldError("eval: --truth and --against are two questions: ask one at a time")
    tensors = tensor_file(data)
    look = look_at(data, split, run.seed, mean=mean, std=std, input_size=input_size)
    source, other = (source, None) if against is None else source.beside(against)
    opened = source.open(look)
    original = None if other is None else other.open(look)
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, mean=mean, std=std, input_size=input_size)
    if tensors is None:
        for one in (opened, original):
            if one is not None:
                check_takes_images(one.model, "--data")
    if original is not None and tensors is None:
        theirs = Preprocess.from_cfg(original.pretrained_cfg, mean=mean, std=std, input_size=input_size)
        if _images(theirs) != _images(preprocess):
            raise SharefoldError(
                f"eval: {source.source} and {against} want other images ({_images(preprocess)}; {_images(theirs)}): give both "
                "the same with --mean, --std, --input-size"
            )
        batch_size = batch_within(BATCH_ELEMENTS, math.prod(preprocess.size), batch_size)
    dataset: Dataset
    if tensors is None:
        dataset = open_data(data, split, transform_cfg=preprocess)
    else:
        dataset = samples = tensors.of(opened.model)
        batch_size = batch_of(samples.inputs, batch_size)
        if original is not None:
            check_count(original.model, samples.inputs, tensors.where)
        elif not samples.labelled:
            raise SharefoldError(f"{tensors.where}: it holds no labels to count by: add an array labels, or give --against")
    stored = isinstance(dataset, ArrayDataset) and dataset.answers is not None
    pairs = with_truth(dataset, truth, split) if truth is not None or (stored and against is None) else None
    if outputs and pairs is None and against is None:
        raise SharefoldError("eval: --outputs says what --against compares or --truth measures: give one of them, too")
    pictures = dataset if pairs is None else pairs.images
    warning = None  # a converted network has its setting with it, and BatchNorms that were given new means
    if not opened.shared and tensors is None:
        warning = input_warning(opened.model.to(device), images_of(pictures, preprocess), preprocess, opened.pretrained_cfg)
    size = len(dataset) if hasattr(dataset, "__len__") else limit or 0
    total = min(size, limit) if limit else size
    # Many data are sorted, and how much outputs vary is told by what comes first.
    batches = loader(dataset, batch_size, shuffle=pairs is None and original is not None, seed=run.seed, workers=workers)
    with run.progress() as progress:

        def tell(done: int) -> None:
            progress("evaluating", done, total)

        if pairs is not None:
            options = TaskOptions(outputs or None, batch_size, limit, workers, device, run.seed)
            report = _task(evaluate_task(opened.model, pairs, options, tell), source.source)
        elif original is None:
            report = _accuracy(evaluate(opened.model, batches, device, limit=limit, progress=tell), source.source)
        else:
            networks = original.model.to(device), opened.model.to(device)
            report = _comparison(compared(*networks, _first(batches, limit), outputs or None, tell), source.source, str(against))
    report.show(run)
    part = split if tensors is None else None
    run.result({"source": source.source, "data": data, "split": part, **report.result, "input_warning": warning})


@dataclass(frozen=True)
class _Report:
    """A table and a line for people, and what the JSON says."""

    head: list[str]
    rows: list[list[Any]]
    result: dict[str, Any]
    line: str = ""

    def show(self, run: Run) -> None:
        run.table(self.head, self.rows)
        if self.line:
            run.say(self.line)


def _accuracy(found: dict[str, Any], source: str) -> _Report:
    row = [source, *(f"{found[key]:.2%}" for key in ("top1", "top5")), f"{found['loss']:.4f}", found["images"]]
    one = found.get("output")
    line = f"labels were compared with the output {one} alone; --against compares all outputs" if one else ""
    return _Report(["source", "top-1", "top-5", "loss", "images", "seconds"], [[*row, f"{found['seconds']:.1f}"]], found, line)


def _comparison(found: Compared, source: str, against: str) -> _Report:
    rows = [[one.name, one.kind, one.metric, one.text(), one.images] for one in found.figures]
    result = {"against": against, "images": found.images, "divergence": found.divergence}
    return _Report(
        ["output", "kind", "", f"{source} to {against} (95%)", "images"], rows,
        {**result, "outputs": [one.to_dict() for one in found.figures]},
        f"divergence {found.divergence:.4g}, mean over {found.images} images",
    )  # fmt: skip


def _task(found: TaskReport, source: str) -> _Report:
    rows = [[figure.metric, figure.text(), found.images] for figure in found.figures]
    for part in found.parts:
        rows.append([f"{part.metric} of {part.id}{f' ({shown(part.name)})' if part.name else ''}", f"{part.value:.2%}", ""])
    return _Report([f"{found.task} of {found.output}", f"{source} (95%)", "images"], rows, found.to_dict(), found.scale)


def _images(preprocess: Preprocess) -> str:
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (preprocess.mean, preprocess.std))
    return f"{'x'.join(map(str, preprocess.size))}, mean {mean}, std {std}"


def _first(batches: Iterable[tuple[Input, Tensor]], limit: int | None) -> Iterator[Input]:
    """The images alone, at most ``limit`` of them."""
    left = limit
    for images, _ in batches:
        yield images[:left]
        left = None if left is None else left - len(images)
        if left is not None and left <= 0:
            return
