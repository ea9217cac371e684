"""The README.md that goes beside a saved network."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from sharefold.format import FileConfig
from sharefold.outputs.figure import told_figures
from sharefold.repair.step_record import StepRecord, measured_on
from sharefold.untrusted import is_int, printable

# What means something to a Markdown reader within a line, an underscore at the end of a word alone; and what GitHub and the Hub
# make links of without being asked.
_MARKUP = re.compile(r"[\\*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ADDRESS = re.compile(r"(?i)https?:(?=//)|ftp:(?=//)|www(?=\.)|@")


def model_card(config: FileConfig) -> str:
    """A model card (Hugging Face front matter, then Markdown) that embeds the exact configuration."""
    plan = config.plan
    name = "a network of your own" if config.base is None else config.base["name"]
    before, after = plan.params_before, plan.params_after
    # Code that builds a network of the user's own is in no file of sharefold.
    builder = "" if config.base is not None else ", model=YourNetwork()"
    lines = [
        "---", "library_name: sharefold", "tags:", "- sharefold", "- model-compression", "---", "",
        f"# {_text(name)}, shared by sharefold", "",
        f"{before:,} -> {after:,} parameters ({after / max(before, 1):.1%} kept), by {_text(plan.source or 'a plan')}.",
        "", "```python", "import sharefold", f'model = sharefold.load("path/to/this/directory"{builder})', "```", "",
    ]  # fmt: skip
    metrics = {**config.metrics, **_agreement(config.metrics), **told_figures(config.metrics)}
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, (int, float, str, bool))]
    if rows:
        lines += ["| metric | value |", "|---|---|"]
        told = ((key, f"{value:.4f}" if isinstance(value, float) else value) for key, value in rows)
        lines += [f"| {_text(key)} | {_text(value)} |" for key, value in told]
        lines.append("")
    lines += ["| group | method | layers | parameters | error |", "|---|---|---|---|---|"]
    for group in plan.groups:
        error = "" if group.error is None else f"{group.error:.4f}"
        lines.append(
            f"| {_text(group.name)} | {_text(group.method)} | {len(group.members)} | "
            f"{group.params_before:,} -> {group.params_after:,} | {error} |"
        )
    lines += _steps(config.steps)
    shown = replace(config, metrics={}, steps=()).to_dict()
    lines += [
        "",
        "<details><summary>Exact configuration</summary>",
        "",
        "```json",
        json.dumps(shown, indent=1).replace("<", "\\u003c"),  # the same JSON, and no tag in it
        "```",
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _steps(steps: Sequence[StepRecord]) -> list[str]:
    """What each step of the conversion did; nothing where the file does not tell."""
    if not steps:
        return []
    lines = ["", "| step | | divergence before | after | |", "|---|---|---|---|---|"]
    for step in steps:
        cells = (step.name, step.outcome, *step.numbers, step.reason)
        lines.append(f"| {' | '.join(_text(cell) for cell in cells)} |")
    told = measured_on(steps)
    return [*lines, *(["", told] if told else [])]


def _agreement(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The agreement with its interval and the number of images behind it, as one entry; nothing where it was not measured."""
    share, interval, count = (metrics.get(key) for key in ("agreement", "agreement_interval", "report_images"))
    numbers = [share, *interval] if isinstance(interval, (list, tuple)) and len(interval) == 2 else [None]
    if not all(isinstance(number, float) for number in numbers) or not is_int(count) or not count:
        return {}
    whose = f"95 % interval of {count} report images, on which nothing was fitted"
    told = f"{numbers[0]:.4f} ({numbers[1]:.4f} to {numbers[2]:.4f}, {whose})"
    hidden = {"agreement": told, "report_images": None, "seen_before": None, "new_agreement": None}
    new, around = metrics.get("new_agreement"), metrics.get("new_agreement_interval")
    if metrics.get("seen_before") is True and isinstance(around, (list, tuple)) and len(around) == 2:
        numbers = [new, *around]
        if all(isinstance(number, float) for number in numbers):
            span = f"{numbers[1]:.4f} to {numbers[2]:.4f}"
            hidden["agreement expected on new images"] = f"{numbers[0]:.4f} ({span}, by mild views of them)"
    return hidden


def _text(value: object) -> str:
    """For a heading or a cell: nothing in it is markup, neither HTML nor Markdown, and no address becomes a link by itself."""
    text = escape(printable(str(value)).replace("`", "'"), quote=False)
    return _ADDRESS.sub(r"\g<0><!-- -->", _MARKUP.sub(r"\\\g<0>", text))
