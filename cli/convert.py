"""``sharefold convert``: the main job. Everything that can be refused is refused before work starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.options import ConvertOptions, PlanOptions

from .agreement_text import agreement_text
from .common import Run, jsonable, shared_options
from .convert_report import Timer, figures_of, group_rows, report_conversion, report_plan, weight_file_bytes
from .convert_request import DEFAULT_BUDGET, Request, check_request
from .input_check import input_warning, look_at
from .keep import check_enough, held_out_for, smallest_keeping
from .record_options import check_choices, record_options
from .source import preprocess_options, source_options
from .tensor_input import check_takes_images, drawn, size_of, tensor_file

if TYPE_CHECKING:
    from torch import nn

    from sharefold.budget import Budgets
    from sharefold.convert import Conversion
    from sharefold.plans import Plan


@click.command("convert")
@source_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory or .safetensors file.")
@click.option(
    "--budget", metavar="SIZE",
    help=f"50%, 2.1M, 8MB (of the file), 50% MACs, 4ms, or several: '50%, 70% MACs'.  [default: {DEFAULT_BUDGET}]",
)  # fmt: skip
@click.option("--keep", metavar="FIGURE", help="Smallest size proven to keep: agreement 99%, psnr 40, cosine .99, error 2% ...")
@click.option("--keep-agreement", metavar="SHARE", help="Smallest size whose predictions agree this often, e.g. 99%.")
@click.option("--outputs", metavar="KIND", multiple=True, help="What an output is: logits:axis=1, boxes:regression; repeatable.")
@record_options(PlanOptions)
@click.option("--plan", type=click.Path(path_type=Path), help="A plan written by --dry-run --json, perhaps edited.")
@click.option("--calib", metavar="DATA", help="Images, or tensors, without labels.  [default: procedural images]")
@click.option("--calib-count", type=click.IntRange(min=1), metavar="N", help="How many.  [default: 1000; 64 large made ones]")
@click.option("--calib-split", default="train", show_default=True, help="Which part of the data.")
@click.option("--calib-resize", is_flag=True, help="Resize stored images of another size.")
@click.option("--recipe", metavar="NAME[:k=v,...]", help="A published system, such as sharesnet.")
@click.option("--store", metavar="TYPE", help="Small types in the file: fp16, int2 to int8, kmeans4, mixed:0.4MB ...")
@record_options(ConvertOptions)
@click.option("--dry-run", is_flag=True, help="Stop at the plan; write nothing.")
@click.option("--force", is_flag=True, help="Replace what is at the output.")
@preprocess_options
@shared_options
def command(
    run: Run,
    calib: str | None,
    calib_count: int | None,
    calib_split: str,
    calib_resize: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    input_size: str | None,
    **options: Any,
) -> None:
    """Turn SOURCE into a smaller network whose layers share parameters, and save it.

    \b
    sharefold convert timm:resnet50 -o resnet50-shared --calib imagefolder:/data/imagenet
    sharefold convert resnet20.th --budget 50% --calib npz:cifar10.npz --json
    sharefold convert tv:resnet18 --dry-run
    sharefold convert stereo.pt --arch stereo.py:Stereo --calib tensors:views.npz
    """
    request = check_request(**options)
    device = run.setup()
    import torch

    import sharefold
    from sharefold.bench import latencies
    from sharefold.calibration.images import COUNT, default_count, matched
    from sharefold.data import Preprocess, calibration_images
    from sharefold.inputs import Input
    from sharefold.measure import count_macs, count_parameters, model_bytes, peak_memory
    from sharefold.methods.sizes import checked_and_counted
    from sharefold.outputs.figures import metrics_of
    from sharefold.planner import Planner
    from sharefold.state_dicts import check_fits_file

    timer = Timer()
    warning: str | None = None
    held_out = None if request.keep is None else held_out_for(request.keep)
    check_names(request)
    tensors = tensor_file(calib)
    look = look_at(calib, calib_split, run.seed, resize=calib_resize, mean=mean, std=std, input_size=input_size)
    opened = request.source.open_dense(look)
    model = opened.model.to(device).eval()
    check_fits_file(model, request.source.source)
    timer.lap("load")
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, input_size=input_size, mean=mean, std=std)
    config = {"base": opened.base, "pretrained_cfg": jsonable({**opened.pretrained_cfg, **preprocess.cfg})}
    images: Input
    example: Input = torch.zeros(1, *preprocess.size, device=device)
    if tensors is None:
        check_takes_images(model, "--calib", None if opened.base or calib else preprocess.size)
    # A recipe's plan, or a given one, needs no images until it is carried out.
    if tensors is not None:
        images = drawn(tensors.of(model), calib_count or COUNT + 2 * (held_out or 0), run.seed)
        example = images[:1].to(device)
        of_images = opened.pretrained_cfg if opened.base else {}
        config["pretrained_cfg"] = jsonable({**of_images, **size_of(images)})
    elif calib is None and request.dry_run and (request.recipe is not None or request.plan is not None):
        images = torch.zeros(1, *preprocess.size)
    else:
        count = calib_count or default_count(*preprocess.size[1:], procedural=calib is None) + 2 * (held_out or 0)
        images = calibration_images(calib, preprocess, count, run.seed, calib_split, resize=calib_resize)
        if calib is None:
            with run.progress() as progress:
                images = matched(model, images, run.seed, progress)
        else:
            warning = input_warning(model, images, preprocess, opened.pretrained_cfg)
    timer.lap("calibration_images")
    before = {"params": count_parameters(model), "bytes": model_bytes(model), "macs": count_macs(model, example)}
    timer.lap("measure")
    # One calibration serves planning and solving, and every trial of --keep.
    cal = sharefold.calibrate(
        model, images, seed=run.seed, example_input=example, outputs=request.outputs or None, held_out=held_out
    )
    if request.keep is not None:
        request.keep.check(metrics_of(cal.reading))
        check_enough(cal, request.keep)
    how = replace(request.how, config=config)
    with run.progress() as progress:
        planner = Planner(cal, request.what, progress)

        def decide(dense: nn.Module, budget: Budgets | float | None) -> Plan:
            if request.plan is not None:
                plan = checked_and_counted(dense, cal.graph, request.plan)
            elif request.recipe is not None:
                plan = sharefold.build_plan(request.recipe, dense, example, cal.graph)
            else:
                assert budget is not None
                plan = planner.plan(budget)
            return plan if request.store is None else replace(plan, store=request.store)

        def carry_out(dense: nn.Module, plan: Plan) -> Conversion:
            return sharefold.convert_(dense, plan, cal, how, progress)

        if request.keep is not None:
            model, done = smallest_keeping(model, request.keep, lambda net, share: carry_out(net, decide(net, share)), cal)
            plan = done.plan
        else:
            plan = decide(model, request.budget)
        timer.lap("plan")
        if request.dry_run:
            report_plan(run, request, plan, before, timer, peak_memory(device))
            return
        if request.keep is None:
            done = carry_out(model, plan)
    timer.lap("convert")
    timer.seconds.update({f"convert_{name}": seconds for name, seconds in done.seconds.items()})
    after = {"params": count_parameters(model), "bytes": model_bytes(model), "macs": count_macs(model, example)}
    result = {
        "source": request.source.source,
        "method": request.decided_by,
        **request.told,
        **{key: {"before": before[key], "after": after[key]} for key in before},
        "groups": group_rows(done.plan),
        **figures_of(done),
        **({} if not done.plan.store else {"store": done.plan.store}),
        "steps": {name: record.to_dict() for name, record in done.steps.items()},
    }
    dense, shared = latencies(done.original, model, images[:1])
    latency = {"before": dense.median, "after": shared.median, "threads": torch.get_num_threads()}
    timer.lap("latency")
    assert request.output is not None
    metrics = {key: value for key, value in result.items() if key not in ("groups", "steps")}
    sharefold.save(model, request.output, metrics=jsonable(metrics), force=request.force)
    timer.lap("save")
    told = agreement_text(done, cal, calib is None)
    report_conversion(run, done, before, after, latency, request.output, timer, told)
    run.result(
        {
            **result,
            "latency": latency,
            "input_warning": warning,
            "seconds": timer.total(),
            "peak_memory_bytes": peak_memory(device),
            "output": str(request.output),
            "file_bytes": weight_file_bytes(request.output),
        }
    )


def check_names(request: Request) -> None:
    """Unknown methods, recipes and stored types are refused before the network is read."""
    from sharefold.recipes import parse_recipe
    from sharefold.store import parse_store

    if request.recipe is not None:
        parse_recipe(request.recipe)
    if request.store is not None:
        parse_store(request.store)
    check_choices(request.what)
