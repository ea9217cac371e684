"""``sharefold report``: one page about a plan or a converted network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError
from sharefold.options import OpenOptions
from sharefold.untrusted import parse_json, read_text

from .common import Run, shared_options
from .source import SourceOptions
from .tensor_input import check_takes_images, tensors_alone

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sharefold.data import TensorFile
    from sharefold.inputs import Input
    from sharefold.plans import Plan
    from sharefold.report import Facts
    from sharefold.report.facts import Weights
    from sharefold.sources import Source


@click.command("report")
@click.argument("what", metavar="PLAN_OR_SHARED", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page, ending in .html.")
@click.option("--source", metavar="SOURCE", help="The dense network, for map and spectra.  [default: see below]")
@click.option("--arch", metavar="NAME", help="Of a bare checkpoint given as --source; of your own network FILE.py:FACTORY.")
@click.option("--data", metavar="tensors:FILE", help="What the network takes, where that is no image.")
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="Also write figures into this folder.")
@click.option("--force", is_flag=True, help="Replace what is there, figures too.")
@shared_options
def command(
    run: Run, what: Path, output: Path, source: str | None, arch: str | None, data: str | None, png: Path | None, force: bool
) -> None:
    """Draw one self-contained HTML page about PLAN_OR_SHARED: a plan's JSON file, or a converted network.

    Without --source the map of a converted network comes from its own file, and that of a plan from the architecture
    that its JSON names.

    \b
    sharefold report resnet20-shared -o resnet20.html
    sharefold report plan.json -o plan.html --source timm:resnet50 --png figures
    """
    from sharefold.files import check_output, write_file

    if output.suffix not in (".html", ".htm"):
        raise SharefoldError(f"output {output}: a page ends in .html")
    target = check_output(output, force)
    run.setup()
    from sharefold.checkpoint import is_sharefold
    from sharefold.report import page

    if not what.exists():
        raise SharefoldError(f"{what} does not exist: name a plan's JSON file, or a sharefold directory or file")
    shared = is_sharefold(what)
    if source is None and not shared and (given := [name for name, value in (("--arch", arch), ("--data", data)) if value]):
        raise SharefoldError(f"{given[0]} is for the network of --source, which is not given: name the dense network with it")
    dense = None if source is None else SourceOptions(source, OpenOptions(arch=arch))
    tensors = tensors_alone(data)
    facts = _shared_facts(what, dense, arch, tensors) if shared else _plan_facts(run, what, dense, tensors)
    document = page(facts)
    figures: list[Path] = []
    if png is not None:
        from sharefold.report.plots import write_plots

        figures = write_plots(facts, png, force)

    def write(temporary: Path) -> None:
        temporary.write_text(document, encoding="utf-8")

    write_file(target, write)
    run.say(f"{target} written ({target.stat().st_size / 1e3:.0f} kB)" + "".join(f", {path}" for path in figures))
    run.result(
        {
            "source": str(what),
            "output": str(target),
            "bytes": target.stat().st_size,
            "groups": len(facts.plan.groups),
            "layers": len(facts.layers),
            "spectra": len(facts.spectra),
            "png": [str(path) for path in figures],
        }
    )


def _shared_facts(path: Path, source: SourceOptions | None, arch: str | None, tensors: TensorFile | None) -> Facts:
    import sharefold
    from sharefold.format import config_of
    from sharefold.report import facts_of
    from sharefold.sources import build_base
    from sharefold.sources.own import is_own

    opened = SourceOptions(str(path), OpenOptions(arch=arch if is_own(arch) else None)).open()
    config = config_of(opened.model)
    weights: Weights = "shared" if source is None else "original"
    if source is not None:
        dense = _dense(source).model
    else:
        try:
            dense = sharefold.expand(opened.model)
        except SharefoldError:  # a method without a dense twin: the map is still that of the architecture
            dense, weights = build_base(opened.base), "none"
    title = f"{opened.name}, shared"
    example = _example(dense, opened.pretrained_cfg, tensors)
    facts = facts_of(title, config.plan, config.metrics, dense, example, weights=weights)
    return replace(facts, steps=config.steps)


def _plan_facts(run: Run, path: Path, source: SourceOptions | None, tensors: TensorFile | None) -> Facts:
    from sharefold.plans import Plan, unwrapped
    from sharefold.report import facts_of

    where = f"plan {path}"
    data = parse_json(read_text(path, where), where)
    plan = Plan.from_dict(data, where)
    inner = {} if unwrapped(data) is data else data
    named = str(inner.get("source") or "")
    known = ("params", "bytes", "macs", "agreement", "agreement_interval", "report_images")
    metrics = {key: inner[key] for key in known if inner.get(key) is not None}
    if source is not None:
        opened = _dense(source)
        example = _example(opened.model, opened.pretrained_cfg, tensors)
        return facts_of(_title(opened.name), plan, metrics, opened.model, example)
    if named.startswith(("timm:", "tv:")):
        return _named_facts(run, named, plan, metrics)
    run.say("no map: the plan does not name a timm or torchvision network; give it with --source")
    return facts_of(_title(path.stem), plan, metrics)


def _named_facts(run: Run, named: str, plan: Plan, metrics: dict[str, Any]) -> Facts:
    """With the map of a network that a file names: it is built without memory, as nobody here asked for it."""
    from sharefold.report import facts_of
    from sharefold.sources.opening import open_shapes

    opened = open_shapes(named)
    title = _title(opened.name)
    try:
        return facts_of(title, plan, metrics, opened.model, _image(opened.pretrained_cfg, "meta"), weights="none")
    except (SharefoldError, RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise
        run.say(f"no map: the way through {opened.name} depends on values; give it with --source")
        return facts_of(title, plan, metrics)


def _title(name: str) -> str:
    return f"Plan for {name}"


def _dense(source: SourceOptions) -> Source:
    opened = source.open()
    if opened.shared:
        raise SharefoldError(f"--source {source.source} is shared already: name the dense network")
    return opened


def _example(dense: nn.Module, config: dict[str, Any], tensors: TensorFile | None) -> Input:
    """What ``dense`` is traced with."""
    if tensors is not None:
        return tensors.of(dense).inputs[:1]
    check_takes_images(dense, "--data")
    return _image(config)


def _image(config: dict[str, Any], device: str = "cpu") -> Tensor:
    import torch

    from sharefold.data import Preprocess

    return torch.zeros(1, *Preprocess.from_cfg(config).size, device=device)
