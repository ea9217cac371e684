"""``sharefold expand``: back to the stock architecture and an ordinary state dict."""

from __future__ import annotations

from pathlib import Path

import click

from sharefold.errors import SharefoldError

from .common import Run, shared_options

SUFFIXES = (".safetensors", ".pt", ".pth")
KINDS = ", ".join(SUFFIXES)
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@click.command("expand")
@click.argument("shared", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=f"File ending in {KINDS}.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="Type of the floating tensors.  [default: their own]")
@click.option("--arch", metavar="FILE.py:FACTORY", help="What builds the dense network, where it is your own.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@shared_options
def command(run: Run, shared: Path, output: Path, dtype: str | None, arch: str | None, force: bool) -> None:
    """Write the dense state dict that computes what SHARED, a sharefold directory or file, computes.

    \b
    sharefold expand resnet20-shared -o resnet20-dense.safetensors
    sharefold expand resnet20-shared -o resnet20-dense-half.safetensors --dtype fp16
    """
    from sharefold.files import check_apart, check_output

    if output.suffix not in SUFFIXES:
        raise SharefoldError(f"output {output}: unknown kind {output.suffix!r}: end it in {KINDS}")
    if output.is_dir():
        raise SharefoldError(f"output {output} is a folder: name a file")
    target = check_output(output, force)
    check_apart(output, shared)
    run.setup()
    import torch

    import sharefold
    from sharefold.export import write_dense
    from sharefold.measure import count_parameters
    from sharefold.sources.own import own_network

    model = sharefold.load(shared, model=None if arch is None else own_network(arch))
    dense = sharefold.expand(model)
    write_dense(dense, target, None if dtype is None else getattr(torch, DTYPES[dtype]))
    before, after = count_parameters(model), count_parameters(dense)
    size = target.stat().st_size
    run.table(["", "shared", "dense"], [["parameters", before, after]])
    run.say(f"{target} written ({size / 1e6:.2f} MB)")
    run.result(
        {"source": str(shared), "params": {"before": before, "after": after}, "dtype": dtype, "bytes": size,
         "output": str(target)}
    )
