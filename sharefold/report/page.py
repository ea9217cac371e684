"""One self-contained HTML page about a plan or a converted network; no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sharefold.outputs.figure import told_figures
from sharefold.plans import GroupPlan
from sharefold.repair.step_record import measured_on
from sharefold.report.facts import Facts
from sharefold.report.style import CSS
from sharefold.report.svg import bar, count_text, network_map, share_text, spectrum_chart, text
from sharefold.version import __version__


def page(facts: Facts) -> str:
    """The whole document. Everything that comes from the plan or the metrics is escaped."""
    plan = facts.plan
    lead = f"{count_text(len(plan.groups), 'group')}, {plan.params_before - plan.params_after:,} parameters saved"
    if plan.source:
        lead += f", by {plan.source}"
    sections = [
        f"<header><h1>{text(facts.title)}</h1><p class='lead'>{text(lead)}.</p>{_tiles(facts)}</header>",
        _map(facts), _groups(facts), _steps(facts), _spectra(facts), _measured(facts),
    ]  # fmt: skip
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        f"<title>{text(facts.title)} \u00b7 sharefold</title><style>{CSS}</style></head>\n<body><main>"
        f"{''.join(sections)}<footer>Made by sharefold {text(__version__)}. Hover over a layer for its name.</footer>"
        "</main></body></html>\n"
    )


def _tiles(facts: Facts) -> str:
    plan, metrics = facts.plan, facts.metrics
    tiles = [_before_after("Parameters", plan.params_before, plan.params_after, "{:,.0f}", 1)]
    for key, what, form, unit in (
        ("bytes", "Tensors, MB", "{:,.2f}", 1e6), ("macs", "Million MACs an image", "{:,.1f}", 1e6),
    ):  # fmt: skip
        pair = metrics.get(key)
        if isinstance(pair, Mapping) and all(isinstance(pair.get(side), (int, float)) for side in ("before", "after")):
            tiles.append(_before_after(what, pair["before"], pair["after"], form, unit))
    before, after = metrics.get("top1_before"), metrics.get("top1_after", metrics.get("top1"))
    if isinstance(after, (int, float)):
        more = f"from {before:.2%}" if isinstance(before, (int, float)) else "measured"
        tiles.append(_tile("Top-1 accuracy", f"{after:.2%}", more))
    if isinstance(metrics.get("agreement"), (int, float)):
        tiles.append(_tile("Agreement", f"{metrics['agreement']:.2%}", _agreement_note(metrics)))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _agreement_note(metrics: Mapping[str, Any]) -> str:
    """What stands below the agreement: its interval and the images behind it, as far as the file tells."""
    count, interval = metrics.get("report_images"), metrics.get("agreement_interval")
    note = "with the dense network"
    if isinstance(count, int):
        note += f", on {count:,} report images, on which nothing was fitted"
    if isinstance(interval, (list, tuple)) and len(interval) == 2 and all(isinstance(end, (int, float)) for end in interval):
        note += f"; 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"
    return note


def _before_after(what: str, before: float, after: float, form: str, unit: float) -> str:
    more = f"from {form.format(before / unit)}, {after / before:.1%} kept" if before else ""
    return _tile(what, form.format(after / unit), more)


def _tile(what: str, value: str, more: str) -> str:
    return (
        f'<div class="tile"><div class="what">{text(what)}</div><div class="value">{text(value)}</div>'
        f'<div class="more">{text(more)}</div></div>'
    )


def _map(facts: Facts) -> str:
    if not facts.layers:
        return ""
    untouched = sum(layer.group is None for layer in facts.layers)
    rounded = f" Weights are stored rounded ({text(facts.plan.store)})." if facts.plan.store else ""
    return (
        '<section id="map"><h2>The network</h2><p class="faint">One cell a layer in forward order, one row a stage, '
        "gaps between blocks. Colour is the group, the solid part of a cell what its group keeps; "
        f"{untouched} of {len(facts.layers)} layers are in no group and are grey.{rounded}</p>{network_map(facts)}</section>"
    )


def _groups(facts: Facts) -> str:
    groups = sorted(facts.plan.groups, key=lambda group: group.params_after - group.params_before)
    longest = max((group.params_before for group in groups), default=1)
    saved = sum(group.params_before - group.params_after for group in groups)
    rows = "".join(_group_row(facts, group, longest, saved) for group in groups)
    head = (
        "<tr><th>Group</th><th>Method</th><th class='number'>Layers</th><th>Parameters before and after</th>"
        "<th class='number'>Kept</th><th class='number'>Saves</th><th class='number'>Of all saved</th>"
        "<th class='number'>Error</th></tr>"
    )
    return (
        '<section id="groups"><h2>What each group costs and saves</h2><p class="faint">Largest saving first. The error '
        "is the relative error of the layers' outputs on calibration images, mean over the members, before any repair."
        f'</p><div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
        f"{_members(facts)}</section>"
    )


def _group_row(facts: Facts, group: GroupPlan, longest: int, saved: int) -> str:
    colour = facts.colour(group.name)
    saves = group.params_before - group.params_after
    options = ", ".join(f"{k} {v}" for k, v in group.options.items() if not isinstance(v, (dict, list)))
    method = text(group.method) + (f"<br><span class='faint'>{text(options)}</span>" if options else "")
    error = "" if group.error is None else f"{group.error:.4f}"
    return (
        f"<tr data-group='{text(group.name)}'><td><span class='name'><span class='swatch' style='background:{colour}'>"
        f"</span>{text(group.name)}</span></td><td>{method}</td><td class='number'>{len(group.members)}</td>"
        f"<td>{bar(group.params_before, group.params_after, longest, colour, 200)}<span class='faint'>"
        f"{group.params_before:,} \u2192 {group.params_after:,}</span></td>"
        f"<td class='number'>{share_text(group.params_after, group.params_before)}</td>"
        f"<td class='number'>{saves:,}</td><td class='number'>{share_text(saves, saved)}</td>"
        f"<td class='number'>{error}</td></tr>"
    )


def _members(facts: Facts) -> str:
    items = "".join(
        f"<li>{text(group.name)}: {', '.join(f'<code>{text(member)}</code>' for member in group.members)}</li>"
        for group in facts.plan.groups
    )
    return f"<details><summary>Members of the groups</summary><ul>{items}</ul></details>"


def _steps(facts: Facts) -> str:
    if not facts.steps:
        return ""
    rows = "".join(
        f"<tr><td>{text(step.name)}</td><td>{text(step.outcome)}</td>"
        + "".join(f"<td class='number'>{text(number)}</td>" for number in step.numbers)
        + f"<td class='faint'>{text(step.reason)}</td></tr>"
        for step in facts.steps
    )
    head = "<tr><th>Step</th><th></th><th class='number'>Divergence before</th><th class='number'>After</th><th></th></tr>"
    return (
        f'<section id="steps"><h2>What each step did</h2><p class="faint">{text(measured_on(facts.steps))}</p>'
        f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div></section>'
    )


def _spectra(facts: Facts) -> str:
    charts = []
    for group in facts.plan.groups:
        if group.name not in facts.spectra:
            continue
        chart = spectrum_chart(
            group.name, facts.spectra[group.name], facts.ranks.get(group.name), facts.colour(group.name)
        )
        error = "" if group.error is None else f", error {group.error:.4f}"
        charts.append(
            f"<figure data-group='{text(group.name)}'>{chart}<figcaption><b>{text(group.name)}</b><br>"
            f"{text(group.method)}, {count_text(len(group.members), 'layer')}{error}</figcaption></figure>"
        )
    if not charts:
        return ""
    whose = "These are the dense weights" if facts.original else "These are the shared weights, as the file has them"
    return (
        '<section id="spectra"><h2>Spectra</h2><p class="faint">How much of the energy of a group\'s weights the best '
        f"directions hold, from none to all of them. {whose}; the dashed line is the rank kept.</p>"
        f'<div class="grid-of-charts">{"".join(charts)}</div></section>'
    )


def _measured(facts: Facts) -> str:
    rows = "".join(
        f"<tr><td>{text(name)}</td><td class='number'>{text(_value(value))}</td></tr>"
        for name, value in _flat({**facts.metrics, **told_figures(facts.metrics)})
    )
    if not rows:
        return ""
    return f'<section id="measured"><h2>Everything measured</h2><table><tbody>{rows}</tbody></table></section>'


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in metrics.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}, ")
        elif value is not None and not isinstance(value, (list, tuple)):
            found.append((name, value))
    return found


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
