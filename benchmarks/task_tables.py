"""The table of networks for other tasks than classes, for ``tables.py``."""

from __future__ import annotations

from table_parts import machine, read, table, taken


def trained_tasks() -> str | None:
    """What the networks of ``tasks.py`` are for, before and after."""
    records = read("tasks.json")
    if not records:
        return None
    rows = []
    for r in records:
        decibels = r["unit"].startswith("dB")
        unit = "mAP" if "mAP" in r["unit"] else "%"
        figures = [f"{value:.2f} dB" if decibels else f"{100 * value:.1f} {unit}" for value in (r["before"], r["after"])]
        if "truth" in r:
            figures = [f"{figure}, {100 * error:.1f} % off" for figure, error in zip(figures, r["truth"], strict=True)]
        rows.append([
            r["task"], r["budget"].replace("%", " %"), f"{r['params'][0]:,} -> {r['params'][1]:,}",
            f"{r['without']:.2f} dB" if decibels else "", *figures, f"{r['lost']:.2f} {r['unit']}",
            "" if r.get("refined") is None else f"{r['refined']['lost']:.2f} ({r['refined']['effort']})", f"{r['most']:g}",
            ", ".join(r["methods"]),
        ])  # fmt: skip
    first, detector = records[0], next((r for r in records if r["task"] == "detector"), None)
    head = ["task", "size", "parameters", "without a network", "trained", "converted", "lost", "refined", "at most", "methods"]
    note = (f"Trained for {first['minutes']:g} minutes on CIFAR-10, converted by 1,000 other images without targets, measured on "
            "2,000 test images: PSNR against the clean images, pixels decided right, classes told right "
            "(`benchmarks/tasks.py`). ")
    if any("truth" in r for r in records):
        note += "Off: relative error of the pictures against the true ones. "
    if detector:
        note += (f"The detector for {detector['minutes']:g} minutes on 10,000 drawn scenes of circles, squares and triangles, "
                 "converted by 1,000 other ones, mAP (IoU 0.5 to 0.95) on 2,000 more (`benchmarks/detector.py`). ")
    missed = []
    for r in (r for r in records if not r["reached"]):
        refined = f", refined {r['refined']['lost']:.2f}" if r.get("refined") else ""
        missed.append(f"{r['task']} ({r['lost']:.2f}{refined}; aim {r['most']:g})")
    if missed:
        note += f"Missed the aim: {', '.join(missed)}. What was tried for two-tasks is in [the log](log.md). "
    machines = " and ".join(sorted({machine(r["hardware"]) for r in records}))
    note += f"On {machines}, seed {first['seed']}. " + taken(rows=records)
    return table(head, rows) + "\n\n" + note
