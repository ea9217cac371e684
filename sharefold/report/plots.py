"""The page's figures as PNG files (extra ``plots``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.files import check_output, write_file
from sharefold.report.facts import Facts
from sharefold.untrusted import printable

DPI = 150
GREY = "#c4cad2"


def write_plots(facts: Facts, folder: Path, force: bool = False) -> list[Path]:
    """Writes ``map.png``, ``groups.png`` and ``spectra.png`` (those that there is something for) into ``folder``.

    Raises:
        SharefoldError: matplotlib is missing, a figure is there and ``force`` is not set, or the folder cannot be written.
    """
    figure = _figure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SharefoldError(f"folder {folder} cannot be made ({error.strerror}): choose another place") from None
    wanted: list[tuple[str, Callable[..., Any], bool]] = [
        ("map.png", _map, bool(facts.layers)), ("groups.png", _groups, bool(facts.plan.groups)),
        ("spectra.png", _spectra, bool(facts.spectra)),
    ]  # fmt: skip
    for name, _, present in wanted:
        if present:
            check_output(folder / name, force)
    written = []
    for name, draw, present in wanted:
        if present:
            _save(draw(facts, figure), folder / name)
            written.append(folder / name)
    return written


def write_curve(points: Sequence[tuple[float, float, str]], reference: float, y_label: str, path: Path) -> None:
    """Accuracy (fractions of 1) against parameters; ``reference`` is the dense network's, a dashed line."""
    canvas = _figure()(figsize=(7.2, 4.4), layout="constrained")
    axes = canvas.subplots()
    axes.plot([x for x, _, _ in points], [100 * y for _, y, _ in points], marker="o", color="#4269d0")
    for x, y, label in points:
        axes.annotate(_plain(label), (x, 100 * y), textcoords="offset points", xytext=(0, -16), ha="center", fontsize=9)
    axes.axhline(100 * reference, color="#888888", linestyle="--", linewidth=1)
    axes.annotate("dense", (0.01, 100 * reference), xycoords=("axes fraction", "data"), va="bottom", fontsize=9)
    axes.set(xlabel="parameters", ylabel=f"{y_label}, %", xlim=(0, None))
    axes.xaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").EngFormatter(sep=""))
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(canvas, path)


def _figure() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise SharefoldError("plots need matplotlib: pip install 'sharefold[plots]'") from None
    matplotlib.use("Agg", force=False)
    return importlib.import_module("matplotlib.figure").Figure


def _plain(text: str) -> str:
    """``text`` as matplotlib shows it: a dollar would begin mathematics, and end the drawing where that makes no sense."""
    return printable(text).replace("$", r"\$")


def _save(canvas: Any, path: Path) -> None:
    write_file(path, lambda temporary: canvas.savefig(temporary, dpi=DPI, format="png"))


def _map(facts: Facts, figure: Any) -> Any:
    """Layers in forward order as bars as high as their parameters; pale before, solid after."""
    canvas = figure(figsize=(10, 3.6), layout="constrained")
    axes = canvas.subplots()
    kept = {g.name: g.params_after / max(g.params_before, 1) for g in facts.plan.groups}
    for index, layer in enumerate(facts.layers):
        colour = GREY if layer.group is None else facts.colour(layer.group)
        share = 1.0 if layer.group is None else kept[layer.group]
        axes.bar(index, layer.params, width=0.9, color=colour, alpha=0.3)
        axes.bar(index, layer.params * share, width=0.9, color=colour)
    for index in range(1, len(facts.layers)):
        if facts.layers[index].stage != facts.layers[index - 1].stage:
            axes.axvline(index - 0.5, color="#888888", linewidth=0.8, linestyle=":")
    axes.set(xlabel="layer, in forward order (dotted: next stage)", ylabel="parameters")
    axes.xaxis.set_major_locator(importlib.import_module("matplotlib.ticker").MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").EngFormatter(sep=""))
    axes.set_xlim(-0.6, len(facts.layers) - 0.4)
    axes.set_title(f"{_plain(facts.title)}: pale before, solid after, grey in no group", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return canvas


def _groups(facts: Facts, figure: Any) -> Any:
    groups = sorted(facts.plan.groups, key=lambda group: group.params_before - group.params_after)
    canvas = figure(figsize=(9, 1.2 + 0.42 * len(groups)), layout="constrained")
    sizes, errors = canvas.subplots(1, 2, width_ratios=(2, 1), sharey=True)
    names = [_plain(f"{group.name} ({group.method})") for group in groups]
    colours = [facts.colour(group.name) for group in groups]
    sizes.barh(names, [group.params_before for group in groups], color=colours, alpha=0.3)
    sizes.barh(names, [group.params_after for group in groups], color=colours)
    errors.barh(names, [group.error or 0.0 for group in groups], color=colours)
    sizes.set_xlabel("parameters: pale before, solid after")
    errors.set_xlabel("relative output error")
    for axes in (sizes, errors):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return canvas


def _spectra(facts: Facts, figure: Any) -> Any:
    canvas = figure(figsize=(7.2, 4.4), layout="constrained")
    axes = canvas.subplots()
    for name, shares in facts.spectra.items():
        colour = facts.colour(name)
        axes.plot([i / (len(shares) - 1) for i in range(len(shares))], shares, color=colour, label=_plain(name))
        if name in facts.ranks:
            rank, full = facts.ranks[name]
            at = min(rank / max(full, 1), 1.0)
            axes.plot([at], [shares[round(at * (len(shares) - 1))]], "o", color=colour)
    axes.set(xlabel="share of the directions (dot: kept)", ylabel="share of the energy", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right")
    return canvas
