"""``sharefold sweep``: the curve of accuracy against size."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.budget import parse_effort
from sharefold.errors import SharefoldError
from sharefold.options import ConvertOptions, PlanOptions
from sharefold.untrusted import exclude_pattern

from .agreement_text import share_text
from .common import Run, jsonable, shared_options
from .input_check import input_warning, look_at
from .record_options import check_choices, record_of, record_options
from .source import SourceOptions, preprocess_options, source_options
from .tensor_input import check_takes_images, drawn, tensor_file

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset


@click.command("sweep")
@source_options
@click.option(
    "--budgets", default="25%,35%,50%,65%", show_default=True, metavar="SIZES",
    help="Sizes, with commas; with semicolons where one has several parts: '50%, 70% MACs; 25%'.",
)  # fmt: skip
@click.option("--data", required=True, metavar="DATA", help="Labelled images to measure accuracy on.")
@click.option("--split", default="test", show_default=True, help="Which part of DATA.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only its first N images.")
@click.option("--calib", metavar="DATA", help="Images without labels.  [default: the training part of --data]")
@click.option("--calib-count", type=click.IntRange(min=1), metavar="N", help="How many.  [default: 1000]")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the results.")
@record_options(PlanOptions)
@record_options(ConvertOptions)
@click.option("--save/--no-save", default=True, show_default=True, help="Keep the converted networks.")
@click.option("--batch-size", type=click.IntRange(min=1), default=250, show_default=True, help="Images a batch.")
@click.option("--force", is_flag=True, help="Replace what is there.")
@preprocess_options
@shared_options
def command(
    run: Run, source: SourceOptions, budgets: str, data: str, split: str, limit: int | None, calib: str | None,
    calib_count: int | None, output: Path, save: bool, batch_size: int, force: bool, mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None, input_size: str | None, **records: Any,
) -> None:  # fmt: skip
    """Convert SOURCE at several budgets, measure each, and plot accuracy against size.

    Writes sweep.csv, sweep.json, sweep.svg (and sweep.png where matplotlib is installed) and the networks themselves.

    \b
    sharefold sweep resnet20.th --budgets 25%,50% --data npz:cifar10.npz -o resnet20-sweep
    """
    from sharefold.files import check_output, write_folder
    from sharefold.ownership import SWEEP_FILES, check_names, network_folder

    what, how = record_of(PlanOptions, records), record_of(ConvertOptions, records)
    parse_effort(how.refine)
    exclude_pattern(what.exclude)
    target = check_output(output, force, SWEEP_FILES)
    device = run.setup()
    import sharefold
    from sharefold.calibration.images import COUNT, default_count
    from sharefold.calibration.parts import FEWEST_IMAGES
    from sharefold.data import Preprocess, calibration_images, loader, open_data
    from sharefold.inputs import Input
    from sharefold.measure import evaluate, model_bytes
    from sharefold.sweep import SweepOptions, parse_budgets, sweep, write_results

    sizes = parse_budgets(budgets)
    tensors = tensor_file(data)
    if tensors is not None and calib is None:
        raise SharefoldError(f"sweep: {data} has no training part: give --calib, too, to measure on new samples")
    learn_from = tensor_file(calib) if calib is not None else None
    if (tensors is None) != (learn_from is None):
        raise SharefoldError("sweep: --data and --calib: give tensors for both, or images")
    folders = [network_folder(size.text) for size in sizes] if save else []
    check_names(target, (), folders)
    methods = (what.method,) if isinstance(what.method, str) else what.method
    check_choices(what)
    start = time.perf_counter()
    opened = source.open_dense(look_at(calib or data, "train", run.seed, mean=mean, std=std, input_size=input_size))
    model = opened.model.to(device).eval()
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, input_size=input_size, mean=mean, std=std)
    config = {"base": opened.base or None, "pretrained_cfg": jsonable({**opened.pretrained_cfg, **preprocess.cfg})}
    dataset: Dataset
    images: Input
    warning = None
    if tensors is not None and learn_from is not None:
        dataset, images = tensors.of(model), drawn(learn_from.of(model), calib_count or COUNT, run.seed)
        config["pretrained_cfg"] = jsonable(opened.pretrained_cfg) if opened.base else {}
    else:
        check_takes_images(model, "--data and --calib")
        dataset = open_data(data, split, transform_cfg=preprocess)
        count = calib_count or default_count(*preprocess.size[1:], procedural=False)
        images = calibration_images(calib or data, preprocess, count, run.seed, "train")
        warning = input_warning(model, images, preprocess, opened.pretrained_cfg)
    how = replace(how, config=config)

    def measure(network: nn.Module) -> dict[str, Any]:
        return evaluate(network, loader(dataset, batch_size), device, limit=limit)

    def fill(folder: Path) -> None:
        def keep(budget: str, network: nn.Module, metrics: dict[str, Any]) -> None:
            told = {**metrics, "bytes": model_bytes(network)}  # as `convert` has it: of the tensors, not of the file
            sharefold.save(network, folder / network_folder(budget), metrics=jsonable(told))

        with run.progress() as progress:
            cal = sharefold.calibrate(model, images, seed=run.seed)
            points = sweep(cal, sizes, measure, SweepOptions(what, how, keep if save else None), progress)
        part = split if tensors is None else None
        details = {"source": source.source, "data": data, "split": part, "method": ",".join(methods), "networks": folders}
        names = write_results(folder, points, details)
        found.update(details, points=[asdict(point) for point in points], files=names)

    found: dict[str, Any] = {}
    write_folder(target, fill)
    run.table(
        ["budget", "parameters", "kept", "MB", "top-1", "top-5", "agreement", "seconds"],
        [
            [p["budget"], p["params"], f"{p['share']:.1%}", f"{p['bytes'] / 1e6:.2f}", f"{p['top1']:.2%}",
             f"{p['top5']:.2%}", None if p["agreement"] is None else share_text(p["agreement"], p["agreement_interval"]),
             f"{p['seconds']:.1f}"]
            for p in found["points"]
        ],
    )  # fmt: skip
    reported = max(p["report_images"] for p in found["points"])
    if reported:
        run.say(f"agreement: top-1, on {reported} calibration images kept for the report (95 % interval)")
    else:
        run.say(f"agreement not measured: only {len(images)} images, {FEWEST_IMAGES} or more are needed")
    run.say(f"{target} written: {', '.join(found['files'])}")
    run.result({**found, "input_warning": warning, "seconds": time.perf_counter() - start, "output": str(target)})
