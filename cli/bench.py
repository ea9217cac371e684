"""``sharefold bench``: what sharing does to speed, memory and files, measured in one run."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError

from .common import Run, shared_options
from .source import SourceOptions, preprocess_options, source_options
from .tensor_input import check_takes_images, shape_of, shape_words, tensors_alone

if TYPE_CHECKING:
    from torch import nn

    from sharefold.bench import Timing
    from sharefold.sources import Source


@click.command("bench")
@source_options
@click.option("--against", metavar="SOURCE2", help="Compare with this.  [default: the dense twin of a shared SOURCE]")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once.")
@click.option("--repeats", type=click.IntRange(min=1), default=40, show_default=True, help="Rounds that count.")
@click.option("--layers/--no-layers", default=True, show_default=True, help="Time every layer in both forms.")
@click.option("--data", metavar="tensors:FILE", help="What the network takes, where that is no image.  [default: images]")
@preprocess_options
@shared_options
def command(
    run: Run, source: SourceOptions, against: str | None, batch: int, repeats: int, layers: bool,
    data: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, input_size: str | None,
) -> None:  # fmt: skip
    """Time SOURCE against its dense twin: latency, throughput, memory, file size, load time, best run-time form.

    All contestants run in turns, so the ratios hold on a busy machine.

    \b
    sharefold bench resnet20-shared --batch 8 --threads 1
    sharefold bench resnet50-shared --against timm:resnet34 --json
    """
    device = run.setup()
    import torch

    from sharefold.bench import explain, forms_of_auto, peak_tensor_bytes, race_forms, race_layers, race_loading
    from sharefold.data import Preprocess
    from sharefold.inputs import Input
    from sharefold.layers import shared_layers
    from sharefold.measure import count_macs, count_parameters, model_bytes, peak_memory

    tensors = tensors_alone(data)
    source, rival_source = (source, None) if against is None else source.beside(against)
    opened = source.open()
    rival, rival_name = _rival(run, opened, rival_source)
    model = opened.model.to(device)
    images: Input
    if tensors is not None:
        samples = tensors.of(model)
        images = samples.batch(torch.arange(batch) % len(samples))[0].to(device)
    else:
        size = Preprocess.from_cfg(opened.pretrained_cfg, input_size=input_size, mean=mean, std=std).size
        check_takes_images(model, "--data", None if opened.base else size)
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(run.seed)).to(device)
    networks: dict[str, nn.Module] = {"source": model}
    if rival is not None:
        networks["against"] = rival = rival.to(device)
    shared = bool(shared_layers(model))
    with run.progress() as progress:
        memory = {name: peak_tensor_bytes(network, images) for name, network in networks.items()}
        times = race_forms(model, rival, images, repeats, progress)
        rows = race_layers(model, images, repeats, progress) if shared and layers else []
        sizes: dict[str, int] = {}
        loading: dict[str, Timing] = {}
        if shared and rival is not None and against is None and opened.base:
            sizes, loading = race_loading(model, rival, progress=progress)
    own = "model" if "model" in times else "auto" if "auto" in times else "composed"
    reading = explain(rows, times, forms_of_auto(model)) if shared else []
    report: dict[str, Any] = {
        "source": source.source,
        "against": rival_name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "batch": batch,
        "threads": torch.get_num_threads(),
        "input_size": shape_of(images),
        "repeats": repeats,
        "latency": {_label(name): asdict(timing) for name, timing in times.items()},
        "throughput": {_label(name): batch / timing.median for name, timing in times.items()},
        "params": {name: count_parameters(network) for name, network in networks.items()},
        "bytes": {name: model_bytes(network) for name, network in networks.items()},
        "macs": {name: count_macs(network, images[:1]) for name, network in networks.items()},
        "peak_tensor_bytes": memory,
        "process_peak_bytes": peak_memory("cpu"),
        "file_bytes": {"source": sizes.get("shared"), "against": sizes.get("dense")},
        "load_seconds": {"source": loading["shared"].median, "against": loading["dense"].median} if loading else {},
        "form": {"runs": own if shared else None, "layers": rows, "explanation": reading},
    }
    _print(run, report, shape_words(images), rival is not None, own)
    run.result(report)


def _label(name: str) -> str:
    return {"dense": "against", "model": "source"}.get(name, name)


def _rival(run: Run, opened: Source, against: SourceOptions | None) -> tuple[nn.Module | None, str | None]:
    """What SOURCE is compared with, and its name."""
    import sharefold
    from sharefold.sources import build_base

    if against is not None:
        return against.open().model, against.source
    if not opened.shared:
        return None, None
    try:
        return sharefold.expand(opened.model), "its dense twin"
    except SharefoldError as error:
        if not opened.base:
            raise
        run.say(f"compared with untrained weights of {opened.name}, which take the same time ({error})")
        return build_base(opened.base).eval(), opened.name


def _print(run: Run, report: dict[str, Any], size: str, compared: bool, own: str) -> None:
    threads = report["threads"]
    run.say(
        f"{report['device']}, batch {report['batch']}, {threads} thread{'s' if threads > 1 else ''}, "
        f"input {size}, {report['repeats']} rounds"
    )
    names = {"against": report["against"], "source": report["source"], "auto": f"{report['source']} (auto)"}
    head = ["", "ms (median)", "quartiles", "images/s"] + (["of the first"] if compared else [])
    rows = []
    for name, timing in report["latency"].items():
        row = [
            names.get(name, f"{report['source']} ({name})"),
            f"{timing['median'] * 1e3:.2f}",
            f"{timing['low'] * 1e3:.2f} to {timing['high'] * 1e3:.2f}",
            f"{report['throughput'][name]:,.1f}",
        ]
        rows.append(row + ([f"{timing['ratio']:.2f}"] if compared else []))
    run.table(head, rows)
    keys = [("parameters", "params", 1), ("MMACs an image", "macs", 1e6), ("tensors MB", "bytes", 1e6),
            ("peak tensors MB", "peak_tensor_bytes", 1e6), ("file MB", "file_bytes", 1e6),
            ("load ms", "load_seconds", 1e-3)]  # fmt: skip
    sides = ["against", "source"] if compared else ["source"]
    run.table(
        ["", *(report[side] for side in sides)],
        [
            [title, *(f"{report[key][side] / unit:,.{0 if unit == 1 else 2}f}" for side in sides)]
            for title, key, unit in keys
            if report[key] and all(report[key].get(side) is not None for side in sides)
        ],
    )
    if report["form"]["layers"]:
        run.table(
            ["layer", "multiplications", "composed ms", "factored ms", "factored / composed", "auto"],
            [[row["name"], f"{row['share']:.0%}", f"{row['composed'] * 1e3:.3f}", f"{row['factored'] * 1e3:.3f}",
              f"{row['ratio']:.2f}", row["auto"]] for row in report["form"]["layers"]],
        )  # fmt: skip
    for line in report["form"]["explanation"]:
        run.say(line)
