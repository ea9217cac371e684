"""``sharefold report``: one page about a plan or a converted network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError
from sharefold.untrusted import parse_json, read_text

from .common import Run, shared_options

if TYPE_CHECKING:
    from sharefold.plans import Plan
    from sharefold.report import Facts
    from sharefold.report.facts import Weights
    from sharefold.sources import Source


@click.command("report")
@click.argument("what", metavar="PLAN_OR_SHARED", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page, ending in .html.")
@click.option("--source", metavar="SOURCE", help="The dense network, for map and spectra.  [default: see below]")
@click.option("--png", type=click.Path(path_type=Path, file_okay=False), help="Also write figures into this folder.")
@click.option("--force", is_flag=True, help="Replace what is there, figures too.")
@shared_options
def command(run: Run, what: Path, output: Path, source: str | None, png: Path | None, force: bool) -> None:
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
    facts = _shared_facts(what, source) if is_sharefold(what) else _plan_facts(run, what, source)
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


def _shared_facts(path: Path, source: str | None) -> Facts:
    import sharefold
    from sharefold.format import config_of
    from sharefold.report import facts_of
    from sharefold.sources import build_base, open_source

    opened = open_source(path)
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
    facts = facts_of(title, config.plan, config.metrics, dense, _example(opened.pretrained_cfg), weights=weights)
    return replace(facts, steps=config.steps)


def _plan_facts(run: Run, path: Path, source: str | None) -> Facts:
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
        return facts_of(_title(opened.name), plan, metrics, opened.model, _example(opened.pretrained_cfg))
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
        return facts_of(title, plan, metrics, opened.model, _example(opened.pretrained_cfg, "meta"), weights="none")
    except (SharefoldError, RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise
        run.say(f"no map: the way through {opened.name} depends on values; give it with --source")
        return facts_of(title, plan, metrics)


def _title(name: str) -> str:
    return f"Plan for {name}"


def _dense(source: str) -> Source:
    from sharefold.sources import open_source

    opened = open_source(source)
    if opened.shared:
        raise SharefoldError(f"--source {source} is shared already: name the dense network")
    return opened


def _example(config: dict[str, Any], device: str = "cpu") -> Any:
    import torch

    from sharefold.data import Preprocess

    return torch.zeros(1, *Preprocess.from_cfg(config).size, device=device)
