"""Figures that a file tells of its network: what may stand there, and how they are shortened for small files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.untrusted import quoted

# Those that packed files keep first.
PACKED_METRICS = ("agreement", "bytes", "macs", "params", "top1")


def check_metrics(metrics: Any) -> None:
    """Refuses figures that JSON cannot hold.

    Raises:
        SharefoldError: names the first one.
    """
    if not isinstance(metrics, Mapping):
        raise SharefoldError(f"save: metrics must map names to figures, not be {kind_of(metrics)}")
    for name, value in metrics.items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            raise SharefoldError(
                f"save: metric {quoted(name)} is {kind_of(value)}: give finite numbers, texts, and lists and mappings of them"
            ) from None


def kind_of(value: object) -> str:
    """What a value is, for messages: its type, or that it is a class itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def short_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are numbers, in few characters, those of :data:`PACKED_METRICS` first."""
    found = {key: _short(metrics[key]) for key in sorted(metrics, key=lambda key: (key not in PACKED_METRICS, key))}
    return {key: value for key, value in found.items() if value is not None}


def _short(value: Any) -> Any:
    """A metric in few characters: five digits of a number, what is true of the converted network of a pair."""
    if isinstance(value, dict):
        return _short(value["after"]) if value.keys() == {"before", "after"} else None
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return value if isinstance(value, (bool, int)) else None
