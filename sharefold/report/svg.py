"""Inline SVG: the network's map, spectra, bars, curves. Colours that depend on light or dark come from CSS classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from sharefold.report.facts import Facts, LayerFact

WIDTH = 1000
LABEL = 116
CELL = 30
GAP, BLOCK_GAP, LINE_GAP, STAGE_GAP = 3, 9, 8, 20
SMALLEST = 9


def text(value: object) -> str:
    """Escaped for HTML text and for attributes."""
    return escape(str(value), quote=True)


def count_text(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def share_text(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def network_map(facts: Facts) -> str:
    """One row a stage, one cell a layer in forward order; width follows the square root of its parameters."""
    stages: dict[int, list[LayerFact]] = {}
    for layer in facts.layers:
        stages.setdefault(layer.stage, []).append(layer)
    kept = {g.name: min(1.0, g.params_after / max(g.params_before, 1)) for g in facts.plan.groups}
    largest = max(layer.params for layer in facts.layers) ** 0.5
    longest = max(sum(layer.params**0.5 for layer in row) for row in stages.values())
    room = WIDTH - LABEL
    most = max(len(row) for row in stages.values())
    scale = max(min(130 / largest, (room - most * BLOCK_GAP) / longest), 44 / largest)
    parts: list[str] = []
    top = 2.0
    for stage, row in stages.items():
        parts.append(f'<text class="stage" x="0" y="{top + 13:.0f}">stage {stage}</text>')
        usual = Counter(layer.input_size for layer in row).most_common(1)[0][0]
        sizes = f"{usual[0]}\u00d7{usual[1]}, {count_text(len(row), 'layer')}"
        parts.append(f'<text class="faint" x="0" y="{top + 27:.0f}">{sizes}</text>')
        left, block = float(LABEL), row[0].block
        for layer in row:
            width = max(SMALLEST, layer.params**0.5 * scale)
            if layer.block != block:
                left += BLOCK_GAP - GAP
                block = layer.block
            if left + width > WIDTH:
                left, top = float(LABEL), top + CELL + LINE_GAP
            parts.append(_cell(facts, layer, left, top, width, kept))
            left += width + GAP
        top += CELL + STAGE_GAP
    height = top - STAGE_GAP + 4
    return (
        f'<svg class="map" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="Map of the network: one cell a '
        f'layer, coloured by group">{"".join(parts)}</svg>'
    )


def _cell(facts: Facts, layer: LayerFact, left: float, top: float, width: float, kept: dict[str, float]) -> str:
    shape = "\u00d7".join(map(str, layer.shape))
    label = f"{layer.name}: {shape}, {layer.params:,} parameters"
    box = f'x="{left:.1f}" width="{width:.1f}" rx="2"'
    if layer.group is None:
        return (
            f'<g class="cell" data-layer="{text(layer.name)}"><title>{text(label)}, in no group</title>'
            f'<rect class="plain" {box} y="{top:.1f}" height="{CELL}"/></g>'
        )
    colour, share = facts.colour(layer.group), kept[layer.group]
    filled = max(2.0, CELL * share)
    return (
        f'<g class="cell" data-layer="{text(layer.name)}" data-group="{text(layer.group)}">'
        f"<title>{text(label)}, in {text(layer.group)} ({share:.0%} kept)</title>"
        f'<rect {box} y="{top:.1f}" height="{CELL}" fill="{colour}" fill-opacity="0.28"/>'
        f'<rect {box} y="{top + CELL - filled:.1f}" height="{filled:.1f}" fill="{colour}"/></g>'
    )


def bar(before: float, after: float, longest: float, colour: str, width: int = 240) -> str:
    """What was there, pale, and what is left, solid, on a scale that ends at ``longest``."""
    full, rest = (max(1.0, width * value / max(longest, 1)) for value in (before, after))
    return (
        f'<svg class="bar" viewBox="0 0 {width} 14" width="{width}" height="14" role="img" '
        f'aria-label="{text(share_text(after, before))} kept">'
        f'<rect width="{full:.1f}" height="14" rx="2" fill="{colour}" fill-opacity="0.28"/>'
        f'<rect width="{rest:.1f}" height="14" rx="2" fill="{colour}"/></svg>'
    )


def spectrum_chart(name: str, shares: Sequence[float], rank: tuple[int, int] | None, colour: str) -> str:
    """Cumulative energy over the share of the rank, 0 to 1 on both axes, the kept rank marked."""
    width, height, left, bottom, top = 260, 150, 34, 24, 10
    inner_width, inner_height = width - left - 8, height - bottom - top

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x * inner_width, top + (1 - y) * inner_height

    points = [place(index / (len(shares) - 1), value) for index, value in enumerate(shares)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    floor = top + inner_height
    parts = []
    for y in (0.0, 0.5, 1.0):
        _, pixel = place(0, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{pixel:.1f}" y2="{pixel:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{pixel + 4:.1f}" text-anchor="end">{y:.0%}</text>')
    parts.append(f'<polygon points="{left},{floor} {line} {width - 8},{floor}" fill="{colour}" fill-opacity="0.18"/>')
    parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
    full = f"{rank[1]:,}" if rank else "all"
    parts.append(f'<text class="tick" x="{left}" y="{height - 8}">0</text>')
    parts.append(f'<text class="tick" x="{width - 8}" y="{height - 8}" text-anchor="end">{full}</text>')
    label = f"Spectrum of {name}"
    if rank:
        at = min(1.0, rank[0] / max(rank[1], 1))
        x, _ = place(at, 0)
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        near_end = at > 0.7
        side = f'x="{x - 5:.1f}" text-anchor="end"' if near_end else f'x="{x + 5:.1f}"'
        parts.append(f'<text class="note" {side} y="{floor - 8:.1f}">rank {rank[0]:,}</text>')
        label += f", rank {rank[0]} of {rank[1]} kept"
    return (
        f'<svg class="spectrum" viewBox="0 0 {width} {height}" role="img" aria-label="{text(label)}">'
        f"{''.join(parts)}</svg>"
    )


def curve_chart(points: Sequence[tuple[float, float, str]], reference: float | None, x_label: str, y_label: str) -> str:
    """Accuracy against size: (x, y, label) in order of x, y and ``reference`` as fractions of 1; a whole SVG file."""
    width, height, left, right, top, bottom = 720, 440, 70, 24, 24, 60
    values = [y for _, y, _ in points] + ([] if reference is None else [reference])
    low, high = min(values), max(values)
    margin = max(0.01, 0.12 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    end = 1.05 * max(x for x, _, _ in points)

    def place(x: float, y: float) -> tuple[float, float]:
        across = left + (width - left - right) * x / end
        return across, top + (height - top - bottom) * (1 - (y - low) / (high - low))

    parts = ['<rect width="100%" height="100%" fill="#ffffff"/>']
    for step in range(5):
        y, x = low + (high - low) * step / 4, end * step / 4
        across, down = place(x, y)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{down:.1f}" y2="{down:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{down + 4:.1f}" text-anchor="end">{y:.1%}</text>')
        parts.append(f'<text x="{across:.1f}" y="{height - bottom + 20}" text-anchor="middle">{_short(x)}</text>')
    if reference is not None:
        _, down = place(0, reference)
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{down:.1f}" y2="{down:.1f}" stroke="#888888" '
                     'stroke-dasharray="6 4"/>')  # fmt: skip
        parts.append(f'<text x="{left + 8}" y="{down - 6:.1f}" fill="#555555">dense</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, _ in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="2.5"/>')
    for x, y, label in points:
        across, down = place(x, y)
        parts.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="5" fill="{_BLUE}"/>')
        parts.append(f'<text x="{across:.1f}" y="{down + 22:.1f}" text-anchor="middle">{text(label)}</text>')
    middle = (left + width - right) / 2
    parts.append(f'<text x="{middle}" y="{height - 14}" text-anchor="middle">{text(x_label)}</text>')
    turned = f'transform="translate(18 {height / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{text(y_label)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#222222">{"".join(parts)}</svg>\n'
    )


_BLUE = "#4269d0"


def _short(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
