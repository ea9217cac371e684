"""What tables of measured figures are made of: results, their days, names and machines."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DATES = RESULTS / "dates.json"
NAMES = {"lite0": "EfficientNet-Lite0", "efficientnet_lite0": "EfficientNet-Lite0", "tf_efficientnet_lite0": "EfficientNet-Lite0"}


def read(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def dates() -> dict[str, list[str]]:
    """File of results -> [day, checksum]; what is not known, or has changed since, is of today."""
    known = json.loads(DATES.read_text()) if DATES.exists() else {}
    found = {}
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".json", ".csv") and path != DATES:
            mark = f"{zlib.crc32(path.read_bytes()):08x}"
            day, old = known.get(path.name, ["", ""])
            found[path.name] = [day if mark == old else date.today().isoformat(), mark]
    return found


def taken(*names: str, rows: Iterable[dict[str, Any]] = ()) -> str:
    """The sentence that says how old figures are: of whole files, and of ``rows``, which have a date each."""
    known = dates()
    days = sorted({known[name][0] for name in names if name in known} | {row["date"] for row in rows})
    return f"Taken on {' and '.join(days)} with the code of {'that day' if len(days) == 1 else 'those days'}."


def earlier(cell: str, cells: dict[str, set[str]]) -> str:
    """`` (of 2026-11-25)`` where a cell of a line is older than the newest one beside it."""
    newest = max((day for days in cells.values() for day in days), default="")
    days = cells.get(cell, {newest})
    return "" if newest in days else f" (of {max(days)})"


def named(network: str) -> str:
    """``resnet20`` -> ``ResNet-20``."""
    return NAMES.get(network, network.replace("resnet", "ResNet-"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def machines(rows: Iterable[dict[str, Any]]) -> str:
    """Every machine that rows were taken on, once."""
    return "; ".join(dict.fromkeys(machine(row["hardware"]) for row in rows))


def grown(peak: dict[str, float]) -> str:
    """``0.9 -> 2.0``: peak memory after a plain pass and after everything, GB."""
    return f"{peak['pass'] / 1e9:.1f} -> {peak['whole'] / 1e9:.1f}"


def machine(hardware: dict[str, Any]) -> str:
    threads = "one thread" if hardware["threads"] == 1 else f"{hardware['threads']} threads"
    where = hardware.get("gpu") or f"{threads} of {hardware['cpu']}"
    return f"{where}, torch {hardware['torch']}"
