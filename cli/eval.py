"""``sharefold eval``: accuracy of any source on any labelled data set."""

from __future__ import annotations

import click

from .common import Run, shared_options
from .input_check import images_of, input_warning, look_at
from .source import SourceOptions, preprocess_options, source_options


@click.command("eval")
@source_options
@click.option("--data", required=True, metavar="DATA", help="npz:FILE, imagefolder:DIR, cifar10:DIR, digits ...")
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
    split: str,
    batch_size: int,
    limit: int | None,
    workers: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    input_size: str | None,
) -> None:
    """Measure top-1 and top-5 accuracy and loss of SOURCE on DATA.

    \b
    sharefold eval timm:resnet18 --data imagefolder:/data/imagenet --split val
    sharefold eval resnet20-shared --data npz:cifar10.npz --json
    """
    device = run.setup()
    from sharefold.data import Preprocess, loader, open_data
    from sharefold.measure import evaluate

    opened = source.open(look_at(data, split, run.seed, mean=mean, std=std, input_size=input_size))
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, mean=mean, std=std, input_size=input_size)
    dataset = open_data(data, split, transform_cfg=preprocess)
    warning = None  # a converted network has its setting with it, and BatchNorms that were given new means
    if not opened.shared:
        warning = input_warning(opened.model.to(device), images_of(dataset, preprocess), preprocess, opened.pretrained_cfg)
    size = len(dataset) if hasattr(dataset, "__len__") else limit or 0
    total = min(size, limit) if limit else size
    with run.progress() as progress:
        result = evaluate(
            opened.model,
            loader(dataset, batch_size, workers=workers),
            device,
            limit=limit,
            progress=lambda done: progress("evaluating", done, total),
        )
    run.table(
        ["source", "top-1", "top-5", "loss", "images", "seconds"],
        [[source.source, f"{result['top1']:.2%}", f"{result['top5']:.2%}", f"{result['loss']:.4f}",
          result["images"], f"{result['seconds']:.1f}"]],
    )  # fmt: skip
    run.result({"source": source.source, "data": data, "split": split, **result, "input_warning": warning})
