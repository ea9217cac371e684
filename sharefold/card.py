"""The README.md that goes beside a saved network."""

from __future__ import annotations

import json
from typing import Any


def model_card(config: dict[str, Any]) -> str:
    """A model card (Hugging Face front matter, then Markdown) that embeds the exact configuration."""
    plan, base = config["plan"], config.get("base") or {}
    name = base.get("name", "a network of your own")
    before, after = plan["params_before"], plan["params_after"]
    lines = [
        "---", "library_name: sharefold", "tags:", "- sharefold", "- model-compression", "---", "",
        f"# {name}, shared by sharefold", "",
        f"{before:,} -> {after:,} parameters ({after / max(before, 1):.1%} kept), by {plan.get('source') or 'a plan'}.",
        "", "```python", "import sharefold", 'model = sharefold.load("path/to/this/directory")', "```", "",
    ]  # fmt: skip
    metrics = config.get("metrics") or {}
    metrics = {**metrics, **_agreement(metrics)}
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float, str, bool))]
    if rows:
        lines += ["| metric | value |", "|---|---|"]
        lines += [
            f"| {key} | {value:.4f} |" if isinstance(value, float) else f"| {key} | {value} |" for key, value in rows
        ]
        lines.append("")
    lines += ["| group | method | layers | parameters | error |", "|---|---|---|---|---|"]
    for group in plan["groups"]:
        error = "" if group.get("error") is None else f"{group['error']:.4f}"
        lines.append(
            f"| {group['name']} | {group['method']} | {len(group['members'])} | "
            f"{group['params_before']:,} -> {group['params_after']:,} | {error} |"
        )
    shown = {key: value for key, value in config.items() if key != "metrics"}
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


def _agreement(metrics: dict[str, Any]) -> dict[str, Any]:
    """The agreement with its interval and the number of images behind it, as one entry; nothing where it was not measured."""
    share, interval, count = (metrics.get(key) for key in ("agreement", "agreement_interval", "report_images"))
    if not isinstance(share, float) or not isinstance(interval, (list, tuple)) or len(interval) != 2 or not count:
        return {}
    told = f"{share:.4f} ({interval[0]:.4f} to {interval[1]:.4f}, 95 % interval of {count} held-out calibration images)"
    hidden = {"agreement": told, "report_images": None, "seen_before": None, "new_agreement": None}
    new, around = metrics.get("new_agreement"), metrics.get("new_agreement_interval")
    if metrics.get("seen_before") and isinstance(new, float) and isinstance(around, (list, tuple)) and len(around) == 2:
        hidden["agreement expected on new images"] = f"{new:.4f} ({around[0]:.4f} to {around[1]:.4f}, by mild views of them)"
    return hidden
