"""``sharefold verify``: whether a saved network is what its card claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError
from sharefold.options import OpenOptions, VerifyOptions

from .common import Run, shared_options
from .record_options import record_of, record_options
from .source import SourceOptions
from .tensor_input import tensor_file

if TYPE_CHECKING:
    from torch.utils.data import Dataset


@click.command("verify")
@click.argument("path", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--source", metavar="SOURCE", help="The original network, for the agreement; needs --data.")
@click.option("--arch", metavar="NAME", help="Of a bare checkpoint given as --source; of your own network FILE.py:FACTORY.")
@click.option("--data", metavar="DATA", help="Labelled images, or tensors, for accuracy and agreement.")
@click.option("--split", default="test", show_default=True, help="Which part of the data.")
@record_options(VerifyOptions)
@shared_options
def command(
    run: Run, path: Path, source: str | None, arch: str | None, data: str | None, split: str, **given: Any
) -> None:
    """Recompute what DIR, a directory or file of sharefold, claims: checksum, parameters, bytes, MACs, and with --source and
    --data agreement and accuracy. Ends with exit code 2 when something differs.

    \b
    sharefold verify resnet20-shared
    sharefold verify resnet20-shared --source resnet20.th --data npz:cifar10.npz
    """
    if source is not None and data is None:
        raise SharefoldError("verify: --source is for the agreement on images: give --data, too")
    device = run.setup()
    from sharefold.checkpoint import load, read_config
    from sharefold.data import open_data
    from sharefold.sources.own import is_own, own_network
    from sharefold.verify import image_config, mismatches, verify

    config = read_config(path)
    dataset: Dataset | None = None
    tensors = tensor_file(data)
    own = own_network(arch) if config.base is None and arch is not None and is_own(arch) else None
    if tensors is not None:
        dataset = tensors.of(load(path) if own is None else own)
    elif data is not None:
        cfg = config.pretrained_cfg
        if config.base is not None and not {"input_size", "mean", "std"} <= cfg.keys():
            cfg = image_config(load(path), config)
        dataset = open_data(data, split, transform_cfg=cfg)
    original = None if source is None else SourceOptions(source, OpenOptions(arch=arch)).open().model
    options = replace(record_of(VerifyOptions, given), device=device)
    claims = verify(path, source=original, data=dataset, model=own, options=options)

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    def verdict(claim: object) -> str:
        if claim.found is None or claim.claimed is None:  # type: ignore[attr-defined]
            return claim.note  # type: ignore[attr-defined]
        return "DIFFERS" if not claim.holds else f"holds ({claim.note})" if claim.note else "holds"  # type: ignore[attr-defined]

    run.table(["claim", "claimed", "found", ""], [[c.name, cell(c.claimed), cell(c.found), verdict(c)] for c in claims])
    wrong = mismatches(claims)
    run.result({
        "path": str(path), "holds": not wrong,
        "claims": [{"name": c.name, "claimed": c.claimed, "found": c.found, "holds": c.holds, "note": c.note} for c in claims],
    })  # fmt: skip
    if wrong:
        raise SharefoldError(f"{path}: {wrong}")
