"""The README.md that goes beside a saved network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sharefold.format import FileConfig


def model_card(config: FileConfig) -> str:
    """A model card (Hugging Face front matter, then Markdown) that embeds the exact configuration."""
    plan = config.plan
    name = "a network of your own" if config.base is None else config.base["name"]
    before, after = plan.params_before, plan.params_after
    lines = [
        "---", "library_name: sharefold", "tags:", "- sharefold", "- model-compression", "---", "",
        f"# {name}, shared by sharefold", "",
        f"{before:,} -> {after:,} parameters ({after / max(before, 1):.1%} kept), by {plan.source or 'a plan'}.",
        "", "```python", "import sharefold", 'model = sharefold.load("path/to/this/directory")', "```", "",
    ]  # fmt: skip
    metrics = {**config.metrics, **_agreement(config.metrics)}
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float, str, bool))]
    if rows:
        lines += ["| metric | value |", "|---|---|"]
        lines += [
            f"| {key} | {value:.4f} |" if isinstance(value, float) else f"| {key} | {value} |" for key, value in rows
        ]
        lines.append("")
    lines += ["| group | method | layers | parameters | error |", "|---|---|---|---|---|"]
    for group in plan.groups:
        error = "" if group.error is None else f"{group.error:.4f}"
        lines.append(
            f"| {group.name} | {group.method} | {len(group.members)} | "
            f"{group.params_before:,} -> {group.params_after:,} | {error} |"
        )
    shown = replace(config, metrics={}).to_dict()
    lines += [
        "",
        "<details><summary>Exact configuration</summary>",
        "",
        "```json",
        json.dumps(shown, indent=1),
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _agreement(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The agreement with its interval and the number of images behind it, as one entry; nothing where it was not measured."""
    share, interval, count = (metrics.get(key) for key in ("agreement", "agreement_interval", "report_images"))
    if not isinstance(share, float) or not isinstance(interval, (list, tuple)) or len(interval) != 2 or not count:
        return {}
    told = f"{share:.4f} ({interval[0]:.4f} to {interval[1]:.4f}, 95 % interval of {count} held-out calibration images)"
    return {"agreement": told, "report_images": None}
