"""Tables of how long conversions take, for ``tables.py``."""

from __future__ import annotations

from table_parts import grown, machines, named, read, table, taken


def speed() -> str | None:
    """How long conversions take, in looks at their images."""
    data = read("speed.json")
    if data is None:
        return None
    rows = []
    for row in data["rows"]:
        passes, latency = row["passes"], row["latency_over_dense"]
        rows.append([
            named(row["network"]), f"{row['images']:,}", f"{row['pass_cpu_seconds']:.1f}",
            *[f"{passes[key]:.1f}" for key in ("moments", "plan", "convert", "whole")],
            grown(row["peak_memory_bytes"]), f"{100 * row['macs']:.0f} %",
            *[f"{latency[batch]:.2f}" for batch in ("1", "64")],
        ])  # fmt: skip
    head = ["network", "images", "one pass [CPU s]", "moments", "plan", "convert", "whole", "peak memory [GB]", "MACs",
            "latency, batch 1", "batch 64"]  # fmt: skip
    starts = ", ".join(f"`{name}` {seconds:.2f} s" for name, seconds in data["start_seconds"].items())
    note = ("Conversions to half the parameters by `auto`, repairs included, in forward passes of the original over all "
            "calibration images; latency of the result over the original's. Start-up, wall-clock: "
            f"{starts}. `benchmarks/speed.py`, {machines(data['rows'])}. "
            + taken(rows=data["rows"]))  # fmt: skip
    return table(head, rows) + "\n\n" + note


def growth() -> str | None:
    """Time and memory of conversions of networks of one kind and different depth."""
    data = read("growth.json")
    if data is None:
        return None
    rows = []
    for row in data["rows"]:
        rows.append([
            named(row["network"]), str(row["layers"]), f"{row['parameters'] / 1e6:.1f}", f"{row['images']:,}",
            f"{row['pass_cpu_seconds']:.1f}", f"{row['cpu_seconds']['whole']:.0f}", f"{row['seconds_a_layer']:.2f}",
            grown(row["peak_memory_bytes"]),
        ])  # fmt: skip
    head = ["network", "layers", "million parameters", "images", "one pass [CPU s]", "conversion", "a layer", "peak memory [GB]"]
    note = ("Random weights, to half the parameters by `auto`, repairs included; CPU seconds, memory of the process. "
            f"`benchmarks/growth.py`, {machines(data['rows'])}. "
            + taken(rows=data["rows"]))  # fmt: skip
    return table(head, rows) + "\n\n" + note
