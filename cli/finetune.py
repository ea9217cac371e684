"""``sharefold finetune``: training with a teacher, with labels, or both; on one process or many."""

from __future__ import annotations

import dataclasses
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.finetune.config import FinetuneConfig
from sharefold.options import OpenOptions, RunOptions
from sharefold.untrusted import printable

from .common import Run, jsonable, shared_options
from .record_options import record_of, record_options
from .source import SourceOptions, source_options
from .tensor_input import check_takes_images, tensor_file

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from sharefold.data import TensorFile


def _list_schedules(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Prints the published schedules and ends."""
    if wanted:
        from sharefold.finetune.published import SCHEDULES

        for name, entry in SCHEDULES.items():
            click.echo(f"{name:32} {entry.trains} ({entry.source})")
        ctx.exit()


@click.command("finetune")
@source_options
@click.option("--data", required=True, metavar="DATA", help="Training images (split train), e.g. npz:FILE.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory or .safetensors file.")
@click.option("--teacher", metavar="SOURCE", help="The original network.  [default: none, labels alone]")
@click.option("--teacher-arch", metavar="NAME", help="Its architecture, if no file says it.  [default: FACTORY of --arch]")
@click.option("--val", metavar="DATA", help="Validation images (split test).  [default: --data]")
@click.option("--no-val", is_flag=True, help="Validate nothing.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="N training images, evenly spaced.")
@click.option("--val-limit", type=click.IntRange(min=1), metavar="N", help="N validation images, evenly spaced.")
@click.option("--recipe-schedule", metavar="NAME", help="Train from random weights as published (--list-schedules).")
@click.option(
    "--list-schedules", is_flag=True, is_eager=True, expose_value=False, callback=_list_schedules,
    help="Say which schedules there are.",
)  # fmt: skip
@click.option("--from-scratch", is_flag=True, help="Random weights first; --recipe-schedule implies it.")
@record_options(RunOptions)
@click.option("--input-size", metavar="C,H,W", help="Input size.  [default: the model's]")
@record_options(FinetuneConfig, without=("seed", "device"))
@shared_options
@click.pass_context
def command(
    ctx: click.Context,
    run: Run,
    source: SourceOptions,
    data: str,
    output: Path,
    teacher: str | None,
    teacher_arch: str | None,
    val: str | None,
    no_val: bool,
    limit: int | None,
    val_limit: int | None,
    recipe_schedule: str | None,
    from_scratch: bool,
    input_size: str | None,
    **settings: Any,
) -> None:
    """Fine-tune SOURCE, usually a sharefold directory, and save it with its metrics.

    \b
    sharefold finetune resnet20-shared --data npz:cifar10.npz --teacher resnet20.th -o resnet20-tuned
    sharefold finetune r50-shared --data imagefolder:/data --teacher timm:resnet50 --no-labels -o r50-tuned
    torchrun --nproc-per-node 8 -m sharefold_cli finetune r50-shared ... --resume
    """
    from sharefold.finetune.published import published

    kept = record_of(RunOptions, settings)
    base = published(recipe_schedule).config() if recipe_schedule else None
    given = {name: value for name, value in settings.items() if value is not None}
    config = FinetuneConfig.build(base, **given, seed=run.seed, device=run.device)
    if not config.labels and teacher is None:
        raise SharefoldError("finetune: --no-labels needs --teacher SOURCE: there is nothing else to learn from")
    first = os.environ.get("RANK", "0") == "0"
    run = dataclasses.replace(run, quiet=run.quiet or not first, json=run.json and first)
    if first:
        _check_output(output, kept.force or kept.resume)
    run.setup()
    import torch

    from sharefold.data import Preprocess, open_data
    from sharefold.finetune.interrupt import Interrupted
    from sharefold.finetune.loaders import limited
    from sharefold.finetune.loop import finetune
    from sharefold.finetune.scratch import reinitialize
    from sharefold.format import FileConfig, carry_config, checked_pretrained_cfg, config_of
    from sharefold.measure import count_parameters
    from sharefold.plans import Plan
    from sharefold.running import dtype_of
    from sharefold.sources.own import is_own

    given_tensors = {name: tensor_file(spec) for name, spec in (("train", data), ("val", val))}
    if given_tensors["train"] is not None and val is None and not no_val:
        raise SharefoldError(f"finetune: {data} has no validation part: give --val tensors:FILE, or --no-val")
    if val is not None and not no_val and (given_tensors["train"] is None) != (given_tensors["val"] is None):
        raise SharefoldError("finetune: --data and --val: give tensors for both, or images")
    opened = source.open()
    model = opened.model
    if dtype_of(model) != torch.float32:
        kind = str(dtype_of(model)).removeprefix("torch.")
        warnings.warn(f"{source.source} is in {kind}: tuned and saved in float32", SharefoldWarning, stacklevel=2)
        model.float()
    preprocess = Preprocess.from_cfg(
        opened.pretrained_cfg, input_size=input_size, mean=config.mean or None, std=config.std or None
    )
    if not opened.shared:  # a network that shares by design, or a dense one: an empty plan describes it
        parameters = count_parameters(model)
        plan = Plan([], parameters, parameters, f"source {source.source}")
        carry_config(model, FileConfig(plan, opened.base or None))
    if given_tensors["train"] is None:
        check_takes_images(model, "--data")
        cfg = jsonable({**opened.pretrained_cfg, **preprocess.cfg})
        carry_config(model, dataclasses.replace(config_of(model), pretrained_cfg=checked_pretrained_cfg(cfg, source.source)))
    if from_scratch or recipe_schedule:
        reinitialize(model, run.seed, joint=config.orthogonality_joint)
    guide = None
    if teacher:
        own = source.options.arch if is_own(source.options.arch) and Path(teacher).exists() else None  # as the student's class
        guide = _teacher(SourceOptions(teacher, OpenOptions(teacher_arch or own, trust_pickle=source.options.trust_pickle)))

    def opened_data(spec: str, split: str, tensors: TensorFile | None) -> Dataset:
        return open_data(spec, split, transform_cfg=preprocess) if tensors is None else tensors.of(model)

    train = opened_data(data, "train", given_tensors["train"])
    checks = None if no_val else opened_data(val or data, "test", given_tensors["val"])
    train = limited(train, limit) if limit else train
    checks = limited(checks, val_limit) if val_limit and checks is not None else checks
    try:
        report = finetune(
            model, train, checks, teacher=guide, config=config,
            run=dataclasses.replace(kept, out=output, quiet=run.quiet),
        )  # fmt: skip
    except Interrupted as stopped:
        click.echo(printable(str(stopped)), err=True)
        ctx.exit(stopped.exit_code)
    kept_as_is = f"{output}: the run had ended before; left as it is (--force writes it anew)"
    run.say(f"{output} written" if report.output else kept_as_is)
    if report.top1_before is not None and report.top1_after is not None and report.top1_after < report.top1_before:
        warnings.warn(
            f"top-1 fell from {report.top1_before:.2%} to {report.top1_after:.2%}: train for more epochs, with smaller batches "
            "or a lower --lr",
            SharefoldWarning,
            stacklevel=2,
        )
    run.result(
        {"source": source.source, "teacher": teacher, "data": data, "schedule": recipe_schedule,
         "params": count_parameters(model), **report.to_dict()}
    )  # fmt: skip


def _teacher(source: SourceOptions) -> nn.Module:
    """The network that is followed; what is wrong with it is said in the words of its own options."""
    try:
        return source.open().model.float()
    except SharefoldError as error:
        raise SharefoldError(f"--teacher: {str(error).replace('--arch', '--teacher-arch')}") from None


def _check_output(output: Path, replace: bool) -> None:
    """Refuses before anything is loaded what saving would refuse hours later."""
    from sharefold.files import check_output
    from sharefold.ownership import network_files

    check_output(output, replace, network_files(output))
