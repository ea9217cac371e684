"""``sharefold eval``: accuracy of any source on any labelled data set, or what it has in common with another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .common import Run, shared_options
from .input_check import images_of, input_warning, look_at
from .source import SourceOptions, preprocess_options, source_options

if TYPE_CHECKING:
    from torch import Tensor

    from sharefold.data import Preprocess
    from sharefold.outputs.streamed import Compared


@click.command("eval")
@source_options
@click.option("--data", required=True, metavar="DATA", help="npz:FILE, imagefolder:DIR, cifar10:DIR, digits ...")
@click.option("--against", metavar="ORIGINAL", help="Compare with this network instead, output by output; needs no labels.")
@click.option("--outputs", metavar="KIND", multiple=True, help="For --against, what an output is: logits:axis=1; repeatable.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images a batch.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N images.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Loader processes.")
@preprocess_options
@shared_options
def command(
    run: Run,
    source: SourceOptions,
    data: str,
    against: str | None,
    outputs: tuple[str, ...],
    split: str,
    batch_size: int,
    limit: int | None,
    workers: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    input_size: str | None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of SOURCE on DATA; with --against what it has in common with another network:
    agreement of classes or masks, PSNR of images, boxes found again.

    \b
    sharefold eval timm:resnet18 --data imagefolder:/data/imagenet --split val
    sharefold eval resnet20-shared --data npz:cifar10.npz --json
    sharefold eval yolo-shared --against yolo:yolov8n.pt --data imagefolder:pictures
    """
    device = run.setup()
    from sharefold.data import Preprocess, loader, open_data
    from sharefold.errors import SharefoldError
    from sharefold.measure import evaluate
    from sharefold.outputs.streamed import compared
    from sharefold.running import BATCH_ELEMENTS, batch_within

    if outputs and against is None:
        raise SharefoldError("eval: --outputs says what --against compares: give --against, too")
    look = look_at(data, split, run.seed, mean=mean, std=std, input_size=input_size)
    source, other = (source, None) if against is None else source.beside(against)
    opened = source.open(look)
    original = None if other is None else other.open(look)
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, mean=mean, std=std, input_size=input_size)
    if original is not None:
        theirs = Preprocess.from_cfg(original.pretrained_cfg, mean=mean, std=std, input_size=input_size)
        if _images(theirs) != _images(preprocess):
            raise SharefoldError(
                f"eval: {source.source} and {against} want other images ({_images(preprocess)}; {_images(theirs)}): give both "
                "the same with --mean, --std, --input-size"
            )
        batch_size = batch_within(BATCH_ELEMENTS, math.prod(preprocess.size), batch_size)
    dataset = open_data(data, split, transform_cfg=preprocess)
    warning = None  # a converted network has its setting with it, and BatchNorms that were given new means
    if not opened.shared:
        warning = input_warning(opened.model.to(device), images_of(dataset, preprocess), preprocess, opened.pretrained_cfg)
    size = len(dataset) if hasattr(dataset, "__len__") else limit or 0
    total = min(size, limit) if limit else size
    batches = loader(dataset, batch_size, workers=workers)
    with run.progress() as progress:

        def tell(done: int) -> None:
            progress("evaluating", done, total)

        if original is None:
            report = _accuracy(evaluate(opened.model, batches, device, limit=limit, progress=tell), source.source)
        else:
            networks = original.model.to(device), opened.model.to(device)
            report = _comparison(compared(*networks, _first(batches, limit), outputs or None, tell), source.source, str(against))
    report.show(run)
    run.result({"source": source.source, "data": data, "split": split, **report.result, "input_warning": warning})


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
    return _Report(["source", "top-1", "top-5", "loss", "images", "seconds"], [[*row, f"{found['seconds']:.1f}"]], found)


def _comparison(found: Compared, source: str, against: str) -> _Report:
    rows = [[one.name, one.kind, one.metric, one.text(), one.images] for one in found.figures]
    result = {"against": against, "images": found.images, "divergence": found.divergence}
    return _Report(
        ["output", "kind", "", f"{source} to {against} (95%)", "images"], rows,
        {**result, "outputs": [one.to_dict() for one in found.figures]},
        f"divergence {found.divergence:.4g}, mean over {found.images} images",
    )  # fmt: skip


def _images(preprocess: Preprocess) -> str:
    mean, std = (", ".join(f"{value:.3g}" for value in values) for values in (preprocess.mean, preprocess.std))
    return f"{'x'.join(map(str, preprocess.size))}, mean {mean}, std {std}"


def _first(batches: Iterable[tuple[Tensor, Tensor]], limit: int | None) -> Iterator[Tensor]:
    """The images alone, at most ``limit`` of them."""
    left = limit
    for images, _ in batches:
        yield images[:left]
        left = None if left is None else left - len(images)
        if left is not None and left <= 0:
            return
