"""``sharefold inspect``: what in a network can share, and why the rest cannot."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sharefold.options import GroupOptions

from .common import Run, shared_options
from .input_check import input_warning, look_at
from .record_options import record_of, record_options
from .source import SourceOptions, preprocess_options, source_options
from .tensor_input import check_takes_images, shape_of, shape_words, tensor_file

if TYPE_CHECKING:
    from sharefold.graph import Group, NetworkGraph
    from sharefold.graph.hidden_channels import HiddenSpace

LOOKED_AT = 8  # samples that tell what the outputs are


@click.command("inspect")
@source_options
@record_options(GroupOptions)
@click.option("--layers", "show_layers", is_flag=True, help="List every layer, not only the groups.")
@click.option("--hidden", "show_hidden", is_flag=True, help="List which channels method fold can leave out.")
@click.option("--data", metavar="DATA", help="Images, no labels: are they prepared as the network expects? Or tensors.")
@click.option("--split", default="train", show_default=True, help="Which part of DATA.")
@preprocess_options
@click.option("--outputs", metavar="KIND", multiple=True, help="What an output is: logits:axis=1, boxes:regression; repeatable.")
@shared_options
def command(
    run: Run,
    source: SourceOptions,
    show_layers: bool,
    show_hidden: bool,
    data: str | None,
    split: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    input_size: str | None,
    outputs: tuple[str, ...],
    **given: Any,
) -> None:
    """Show which layers of SOURCE are isomorphic, in which groups, and which are left out.

    \b
    sharefold inspect timm:resnet50 --no-pretrained
    sharefold inspect my-network.pt --data imagefolder:/data/imagenet
    """
    exclude, options = given["exclude"], record_of(GroupOptions, given)
    device = run.setup()
    import torch

    from sharefold.calibration.input_fit import sample_size
    from sharefold.data import Preprocess, calibration_images
    from sharefold.graph import analyze, find_groups
    from sharefold.graph.hidden_channels import hidden_spaces
    from sharefold.inputs import Input
    from sharefold.measure import count_parameters
    from sharefold.outputs import read_outputs

    tensors = tensor_file(data)
    opened = source.open(look_at(data, split, run.seed, mean=mean, std=std, input_size=input_size))
    preprocess = Preprocess.from_cfg(opened.pretrained_cfg, mean=mean, std=std, input_size=input_size)
    size, warning = preprocess.size, None
    model = opened.model.to(device)
    few: Input
    if tensors is not None:
        few = tensors.of(model).inputs[:LOOKED_AT].to(device)
        example = few[:1]
    else:
        check_takes_images(model, "--data", None if opened.base or data is not None else size)
        if data is not None:
            images = calibration_images(data, preprocess, sample_size(*size[1:]), run.seed, split)
            warning = input_warning(model, images, preprocess, opened.pretrained_cfg)
        example, few = torch.zeros(1, *size, device=device), calibration_images(None, preprocess, LOOKED_AT, run.seed).to(device)
    graph = analyze(model, example)
    groups = find_groups(graph, options)
    total = count_parameters(opened.model)
    spaces, stay = hidden_spaces(opened.model, graph, exclude)
    _print(run, opened.name, graph, groups, total, shape_words(example), show_layers)
    if show_hidden:
        _print_hidden(run, spaces, stay)
    reading = read_outputs(model, few, graph, outputs or None)
    run.table(["output", "is", "because"], reading.lines(), title="outputs")
    run.result(
        {
            "source": source.source,
            "outputs": [leaf.to_dict() for leaf in reading.leaves],
            "params": total,
            "input_size": shape_of(example),
            "traced": graph.traced,
            "trace_note": graph.trace_note,
            "layers": [_layer(record) for record in graph.layers.values()],
            "groups": [_group(group) for group in groups],
            "repeats": [{"name": repeat.name, "blocks": repeat.blocks} for repeat in graph.repeats],
            "skipped": graph.skipped,
            "hidden": [asdict(space) for space in spaces],
            "not_hidden": stay,
            "input_warning": warning,
        }
    )


def _weights(shape: tuple[int, int, int, int]) -> int:
    o, i, h, w = shape
    return o * i * h * w


def _layer(record: Any) -> dict[str, Any]:
    return {
        "name": record.name,
        "kind": record.kind,
        "class": record.module_class,
        "weight_shape": record.weight_shape,
        "groups": record.groups,
        "stride": record.stride,
        "input_size": record.input_size,
        "output_size": record.output_size,
        "stage": record.stage,
        "block": record.block,
        "role": record.role,
        "calls": record.calls,
        "norm": record.norm,
        "reads_stream": record.reads_stream,
        "writes_stream": record.writes_stream,
        "private_input": record.private_input,
        "private_output": record.private_output,
        "params": _weights(record.weight_shape),
    }


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "stage": group.stage,
        "role": group.role,
        "weight_shape": group.weight_shape,
        "groups": group.groups,
        "members": group.members,
        "params": _weights(group.weight_shape) * len(group.members),
    }


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _print(
    run: Run,
    name: str,
    graph: NetworkGraph,
    groups: list[Group],
    total: int,
    size: str,
    show_layers: bool,
) -> None:
    run.say(f"{name}: {total:,} parameters, input {size}, traced by {graph.traced}")
    if graph.trace_note:
        run.say(f"note: {graph.trace_note}")
    if show_layers:
        run.table(
            ["layer", "shape", "groups", "stage", "role", "block", "input", "stream", "norm"],
            [
                [r.name, _shape(r.weight_shape), str(r.groups), str(r.stage), r.role, r.block, _shape(r.input_size),
                 "+".join(word for word, yes in (("reads", r.reads_stream), ("writes", r.writes_stream)) if yes),
                 r.norm or ""]
                for r in graph.layers.values()
            ],
            title="layers",
        )  # fmt: skip
    rows = []
    shareable = 0
    for group in groups:
        weights = _weights(group.weight_shape) * len(group.members)
        shareable += weights - _weights(group.weight_shape)
        rows.append([group.name, str(group.stage), group.role, _shape(group.weight_shape), str(len(group.members)),
                     weights, f"{weights / max(total, 1):.1%}"])  # fmt: skip
    run.table(["group", "stage", "role", "shape", "layers", "parameters", "of all"], rows, title="groups")
    for repeat in graph.repeats:
        run.say(f"repeated block {repeat.name}: {len(repeat.blocks)} equal blocks in a row")
    if graph.skipped:
        run.table(["left out", "because"], list(graph.skipped.items()))
    run.say(f"one kernel a group would save {shareable:,} parameters ({shareable / max(total, 1):.1%})")


def _print_hidden(run: Run, spaces: list[HiddenSpace], stay: dict[str, str]) -> None:
    rows = [
        [space.writer, str(space.channels), " ".join((*space.gates, *space.through)), " ".join(space.readers)] for space in spaces
    ]
    run.table(["hidden channels of", "channels", "carried by", "read by"], rows, title="what method fold can leave out")
    if stay:
        run.table(["channels of", "stay because"], list(stay.items()))
