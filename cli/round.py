"""``sharefold round``: a converted network in a small file, after fine-tuning for instance."""

from __future__ import annotations

from pathlib import Path

import click

from sharefold.errors import SharefoldError
from sharefold.options import RoundOptions

from .agreement_text import agreement_text
from .common import Run, jsonable, shared_options
from .convert_report import Timer, figures_of, print_steps, weight_file_bytes
from .record_options import record_options
from .source import SourceOptions, source_options
from .tensor_input import check_takes_images, drawn, tensor_file


@click.command("round")
@source_options
@click.option("--store", required=True, metavar="TYPE", help="int2 to int8, kmeans4, fp16 ..., or the size of the file: 60kB.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory or .safetensors file.")
@click.option("--outputs", metavar="KIND", multiple=True, help="What an output is: logits:axis=1, boxes:regression; repeatable.")
@click.option("--calib", metavar="DATA", help="Images, or tensors, without labels.  [default: procedural images]")
@click.option("--calib-count", type=click.IntRange(min=1), metavar="N", help="How many.  [default: 1000; 64 large made ones]")
@click.option("--calib-split", default="train", show_default=True, help="Which part of the data.")
@record_options(RoundOptions)
@click.option("--force", is_flag=True, help="Replace what is at the output.")
@shared_options
def command(
    run: Run, source: SourceOptions, store: str, output: Path, outputs: tuple[str, ...], calib: str | None,
    calib_count: int | None, calib_split: str, refine: str | None, force: bool,
) -> None:  # fmt: skip
    """Round the weights of SOURCE, a sharefold directory or file, and save it small.

    \b
    sharefold round resnet20-tuned --store 60kB --calib npz:cifar10.npz -o resnet20-60kB.safetensors
    sharefold round resnet20-tuned --store 30kB --calib npz:cifar10.npz --refine 4m -o resnet20-30kB.safetensors
    sharefold round resnet50-tuned --store int8 --calib imagefolder:/data/imagenet -o resnet50-int8
    """
    from sharefold.files import check_output
    from sharefold.ownership import network_files

    check_output(output, force, network_files(output))
    device = run.setup()
    import sharefold
    from sharefold.calibration.images import COUNT, default_count, matched
    from sharefold.data import Preprocess, calibration_images
    from sharefold.inputs import Input
    from sharefold.measure import model_bytes
    from sharefold.round import checked_effort, round_with, store_of

    timer = Timer()
    kind = store_of(store)
    options = RoundOptions(run.seed, outputs=outputs or None, refine=refine)
    checked_effort(options, kind)
    tensors = tensor_file(calib)
    opened = source.open()
    if not opened.shared:
        raise SharefoldError(f"{source.source} is not converted: round dense networks by sharefold convert --store {store}")
    model = opened.model.to(device).eval()
    timer.lap("load")
    images: Input
    before = model_bytes(model)
    with run.progress() as progress:
        if tensors is not None:
            images = drawn(tensors.of(model), calib_count or COUNT, run.seed)
        else:
            check_takes_images(model, "--calib")
            preprocess = Preprocess.from_cfg(opened.pretrained_cfg)
            count = calib_count or default_count(*preprocess.size[1:], procedural=calib is None)
            images = calibration_images(calib, preprocess, count, run.seed, calib_split)
            images = matched(model, images, run.seed, progress) if calib is None else images
        done, cal = round_with(model, kind, images, options, progress)
    timer.lap("round")
    figures = figures_of(done)
    # Under a name of their own: a file's agreement is that with the original, which nobody has measured here.
    sharefold.save(model, output, metrics=jsonable({"store": kind, "rounding": figures}), force=force)
    timer.lap("save")
    size = weight_file_bytes(output)
    run.table(["", "MB"], [["weights in memory", f"{before / 1e6:.3f}"], ["file", f"{size / 1e6:.3f}"]])
    print_steps(run, list(done.steps.values()))
    run.say(f"{output} written; beside the network before rounding: {agreement_text(done, cal, calib is None)}")
    for figure in done.outputs:
        if figure.metric != "agreement":
            run.say(f"{figure.name}: {figure.metric} {figure.text()}")
    steps = {name: record.to_dict() for name, record in done.steps.items()}
    run.result(
        {"source": source.source, "store": kind, **figures, "steps": steps, "bytes": {"memory": before, "file": size},
         "seconds": timer.total(), "output": str(output)}
    )  # fmt: skip
