"""Tables of what was measured on a GPU, for ``tables.py``."""

from __future__ import annotations

from typing import Any

from table_parts import machine, named, read, table, taken


def _of(what: str) -> list[dict[str, Any]]:
    return [record for record in read("gpu.json") or [] if record["what"] == what]


def converted_on_gpu() -> str | None:
    """Seconds of the phases of conversions, and what came out."""
    records = _of("convert")
    if not records:
        return None
    rows = []
    for record in records:
        where = [r for r in _of("accuracy") if r["network"] == record["network"]] if "kl" not in record else [record]
        found = where[0]
        rows.append([
            f"{named(record['network'])}, {record['budget'].replace('%', ' %')}",
            *[f"{record['seconds'][key]:.1f}" for key in ("calibrate", "plan", "convert", "whole")],
            "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f}",
            f"{100 * found['top1_dense']:.2f}", f"{100 * found['top1']:.2f}", f"{found['kl']:.4f}", f"{found['images']:,}",
            machine(record["hardware"]),
        ])  # fmt: skip
    head = ["network", "calibrate [s]", "plan", "convert", "whole", "peak GPU memory [GB]", "original [%]", "converted [%]", "KL",
            "test images", "on"]  # fmt: skip
    note = ("1,000 calibration images each; those of CIFAR-10 came compressed (AVIF, 41.5 dB), which costs "
            "accuracy, on the CPU as well. `benchmarks/gpu.py`. " + taken(rows=records))  # fmt: skip
    return table(head, rows) + "\n\n" + note


def latency_on_gpu() -> str | None:
    """Converted over dense, in the form that every layer picks and with all layers composed."""
    records = _of("latency")
    if not records:
        return None
    rows = []
    for record in records:
        for row in record["rows"]:
            memory = row["converted_peak_bytes"] / row["dense_peak_bytes"]
            rows.append([
                f"{named(record['network'])}, {record['budget'].replace('%', ' %')}", f"{100 * record['macs_kept']:.0f} %",
                str(row["batch"]), row["dtype"], f"{row['dense_ms']:.1f}", f"{row['converted_ratio']:.2f}",
                f"{row['composed_ratio']:.2f}", f"{memory:.2f}",
            ])  # fmt: skip
    head = ["network", "MACs", "batch", "type", "original [ms]", "converted", "composed", "memory of a pass"]
    note = (f"One kernel at a time, channels last, over the original's. {machine(records[0]['hardware'])}, `benchmarks/gpu.py`. "
            + taken(rows=records))  # fmt: skip
    return table(head, rows) + "\n\n" + note


def tuning_steps() -> str | None:
    """Images a second of the updates of fine-tuning."""
    records = read("finetune_step.json")
    if not records:
        return None
    cells: dict[tuple[str, int, bool], dict[str, dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["case"], record["batch"], record["compile"]), {})[record["network"]] = record
    rows = []
    for (case, batch, compiled), pair in cells.items():
        shared, dense = pair["shared"], pair.get("dense")
        rows.append([
            case, str(batch), "compiled" if compiled else "", "" if dense is None else f"{dense['images_per_second']:,.0f}",
            f"{shared['images_per_second']:,.0f}",
            "" if dense is None else f"{shared['images_per_second'] / dense['images_per_second']:.2f}",
            f"{shared['first_updates_seconds']:.1f}",
        ])  # fmt: skip
    head = ["case", "batch", "", "original [images/s]", "converted [images/s]", "ratio", "first updates [s]"]
    note = (f"Updates recorded as CUDA graphs, teacher included, images on the device. {machine(records[0]['hardware'])}, "
            "`benchmarks/finetune_step.py`. " + taken(rows=records))  # fmt: skip
    return table(head, rows) + "\n\n" + note


def tuning_recipes() -> str | None:
    """Optimizers and losses compared."""
    records = read("finetune_recipes.json")
    if not records:
        return None
    rows = [
        [r["case"], r["recipe"], str(r["epochs"]), f"{r['seconds']:.0f}", *[f"{100 * r[k]:.2f}" for k in ("top1_before", "top1")]]
        for r in records
    ]
    head = ["case", "recipe", "epochs", "seconds", "converted [%]", "tuned [%]"]
    seen = sorted({r["deciding_images"] for r in records})
    note = (f"On the first {' or '.join(f'{n:,}' for n in seen)} test images, batches of 512, seed 0; half a point is noise. "
            "Training images as AVIF of 41.5 dB. "
            f"{machine(records[0]['hardware'])}, `benchmarks/finetune_recipes.py`. " + taken(rows=records))  # fmt: skip
    return table(head, rows) + "\n\n" + note
