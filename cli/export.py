"""``sharefold export``: a network for programs that know nothing of sharefold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sharefold.errors import SharefoldError
from sharefold.options import ExportOptions

from .common import Run, shared_options
from .record_options import record_of, record_options
from .source import SourceOptions, preprocess_options, source_options
from .tensor_input import check_takes_images, tensors_alone

FORMATS = ("onnx", "pt2", "dense")


def batch_of(text: str) -> int | None:
    """None for ``dynamic``, else the number of images.

    Raises:
        SharefoldError: neither.
    """
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SharefoldError(f"--batch {text!r}: write dynamic, or a number of images")
    return int(text)


@click.command("export")
@source_options
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file.")
@click.option("--format", "kind", type=click.Choice(FORMATS), help="What to write.  [default: by the file's suffix]")
@click.option("--batch", default="dynamic", show_default=True, metavar="N", help="dynamic, or a fixed batch size.")
@record_options(ExportOptions)
@click.option("--data", metavar="tensors:FILE", help="What the network takes, where that is no image.  [default: images]")
@preprocess_options
@shared_options
def command(
    run: Run, source: SourceOptions, output: Path, kind: str | None, batch: str, data: str | None,
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, input_size: str | None, **given: Any,
) -> None:  # fmt: skip
    """Write SOURCE as ONNX, as a torch.export archive, or as the dense state dict of the stock architecture.

    Shared tensors are stored once. What was written is run and compared with SOURCE before it gets its name.

    \b
    sharefold export resnet20-shared -o resnet20.onnx
    sharefold export resnet20-shared -o resnet20.pt2 --batch 1
    sharefold export resnet20-shared -o resnet20.safetensors --format dense
    sharefold export stereo-shared --arch stereo.py:Stereo --data tensors:views.npz -o stereo.onnx
    """
    fixed = batch_of(batch)
    options = replace(record_of(ExportOptions, given), dynamic_batch=fixed is None)
    if not options.tolerance >= 0:
        raise SharefoldError(f"--tolerance {options.tolerance}: must be 0 or more")
    run.setup()
    import torch

    from sharefold.data import Preprocess
    from sharefold.export import export, format_of
    from sharefold.files import check_apart, check_output
    from sharefold.inputs import Input, each_of

    kind = format_of(output, kind)
    check_output(output, options.force)
    check_apart(output, source.source)
    tensors = tensors_alone(data)
    opened = source.open()
    example: Input
    if tensors is not None:
        example = tensors.of(opened.model).inputs[: fixed or 2]
        if len(example) < (fixed or 1):
            raise SharefoldError(f"{tensors.where}: it holds {len(example)} samples, --batch {fixed} needs as many: store more")
    else:
        size = Preprocess.from_cfg(opened.pretrained_cfg, input_size=input_size, mean=mean, std=std).size
        check_takes_images(opened.model, "--data", None if opened.base else size)
        example = torch.randn(fixed or 2, *size, generator=torch.Generator().manual_seed(run.seed))
    done = export(opened.model, output, kind, example, options)
    first = None if done.dynamic_batch else fixed
    shapes = [[first, *tensor.shape[1:]] for tensor in each_of(example)]
    batches = "any batch size" if done.dynamic_batch else f"batches of {fixed}"
    run.table(
        ["file", "format", "MB", "tensors MB", "largest difference", "takes"],
        [[str(done.path), done.format, f"{done.bytes / 1e6:.3f}", f"{done.tensor_bytes / 1e6:.3f}",
          f"{done.max_difference:.2g}", batches]],
    )  # fmt: skip
    if options.store_codes:
        run.say(f"{done.codes} tensors are stored as the integers, or halves, that they were rounded to")
    run.result(
        {
            "source": source.source,
            "format": done.format,
            "bytes": done.bytes,
            "tensor_bytes": done.tensor_bytes,
            "codes": done.codes,
            "max_difference": done.max_difference,
            "tolerance": options.tolerance,
            "dynamic_batch": done.dynamic_batch,
            "input_shape": shapes[0] if len(shapes) == 1 else shapes,
            "inputs": done.inputs,
            "outputs": done.outputs,
            "output": str(done.path),
        }
    )
