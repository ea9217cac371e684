"""Draws the pictures of README and CONTRIBUTING: what a converted group of layers holds, and the floors of the package.

    python scripts/draw_pictures.py             # writes docs/pictures/*.svg
    python scripts/draw_pictures.py --check     # writes nothing; exit 1 when a picture is out of date

The floors are those of tests/test_floors.py. Colours follow the reader's light or dark scheme, on a ground of their own, so
that text can be read wherever the picture stands.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
STYLE = """
.ground { fill: #ffffff; } .line { stroke: #8c959f; } .text { fill: #1f2328; } .faint { fill: #59636e; }
.dense { fill: #d0d7de; } .bank { fill: #0969da; } .mix { fill: #54aeff; } .own { fill: #e16f24; } .floor { fill: #eaeef2; }
.room { fill: #ffffff; stroke: #8c959f; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; } .line { stroke: #6e7681; } .text { fill: #e6edf3; } .faint { fill: #9198a1; }
  .dense { fill: #3d444d; } .bank { fill: #1f6feb; } .mix { fill: #79c0ff; } .own { fill: #f0883e; } .floor { fill: #1c2128; }
  .room { fill: #0d1117; stroke: #6e7681; }
}
text { font-family: sans-serif; font-size: 14px; }
.title { font-size: 16px; font-weight: bold; } .small { font-size: 12px; } .code { font-family: monospace; font-size: 13px; }
""".strip()

# The example of the picture: layers of a stage, channels in and out, side of the kernel, shared filters, own ones a layer.
LAYERS, CHANNELS, SIDE, SHARED, OWN = 3, 64, 3, 48, 8


def sizes() -> tuple[int, int, int]:
    """Numbers in all dense layers, in the bank, and in what one layer has of its own (method ``hybrid``, whole factors)."""
    features = CHANNELS * SIDE * SIDE
    own = CHANNELS * SHARED + OWN * (CHANNELS * SIDE + CHANNELS * SIDE)
    return LAYERS * CHANNELS * features, SHARED * features, own


def rect(kind: str, x: float, y: float, width: float, height: float, corner: float = 3) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"/>'


def text(content: str, x: float, y: float, kind: str = "text", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, arrow: bool = False) -> str:
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<path class="line" fill="none" stroke-width="1.5" d="M{x1:g} {y1:g} L{x2:g} {y2:g}"{end}/>'


def stripes(kind: str, x: float, y: float, width: float, height: float, rows: int) -> Iterator[str]:
    """A matrix of ``rows`` filters, one a row."""
    step = height / rows
    for row in range(rows):
        yield rect(kind, x, y + row * step, width, step - 2, 1)


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    arrow = ('<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
             '<path class="line" fill="none" stroke-width="1.5" d="M1 1 L7 4 L1 7"/></marker></defs>')  # fmt: skip
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
    body = [head, f"<title>{escape(title)}</title>", f"<style>\n{STYLE}\n</style>", arrow, rect("ground", 0, 0, width, height, 8)]
    return "\n".join([*body, *parts, "</svg>"]) + "\n"


def sharing() -> str:
    """Bank, members and own parts."""
    dense, bank, own = sizes()
    after = bank + LAYERS * own
    parts = [text("Before", 24, 32, "text title"), text("every layer has all its filters", 24, 52, "faint small")]
    top, pitch = 76, 92
    for index in range(LAYERS):
        y = top + index * pitch
        parts += [*stripes("dense", 24, y, 104, 70, 8), text(f"layer {index + 1}", 140, y + 30)]
        parts.append(text(f"{dense // LAYERS:,}", 140, y + 50, "faint small"))
    middle = top + pitch + 35
    parts += [line(212, middle, 262, middle, arrow=True), text("convert", 237, middle - 10, "faint small", "middle")]
    parts += [text("Bank", 290, 32, "text title"), text("shared filters, once", 290, 52, "faint small")]
    parts += [*stripes("bank", 290, middle - 60, 104, 120, 10), text(f"{SHARED} filters", 342, middle + 80, "text", "middle")]
    parts.append(text(f"{bank:,}", 342, middle + 98, "faint small", "middle"))
    parts += [text("Members", 464, 32, "text title"), text("mix them by coefficients", 464, 52, "faint small")]
    parts += [text("Own parts", 668, 32, "text title"), text("a few filters of their own", 668, 52, "faint small")]
    for index in range(LAYERS):
        y = top + index * pitch
        parts.append(line(398, middle, 458, y + 35, arrow=True))
        parts += [*stripes("mix", 464, y, 56, 70, 8), text(f"layer {index + 1}", 532, y + 30)]
        parts.append(text(f"{CHANNELS * SHARED:,}", 532, y + 50, "faint small"))
        parts += [text("+", 634, y + 42, "text title"), *stripes("own", 668, y, 56, 26, 3)]
        parts += [text(f"{OWN} own", 736, y + 18), text(f"{own - CHANNELS * SHARED:,}", 736, y + 38, "faint small")]
    note = f"{LAYERS} layers of {CHANNELS} channels, {SIDE} x {SIDE}: {dense:,} numbers"
    parts.append(text(note, 24, 356, "faint"))
    parts.append(text(f"{bank:,} shared + {LAYERS} x {own:,} own = {after:,} ({after / dense:.0%})", 464, 356, "faint"))
    return page(830, 376, "A bank of shared filters, read by three layers, each with coefficients and filters of its own", parts)


def floors() -> tuple[tuple[str, ...], ...]:
    """Bottom to top, as the test that guards them says."""
    tree = ast.parse((ROOT / "tests" / "test_floors.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "FLOORS" for target in node.targets):
            return ast.literal_eval(node.value)
    raise SystemExit("draw_pictures: tests/test_floors.py has no FLOORS")


def house() -> str:
    """The floors, the top one first: every file may import from its own floor and from those below."""
    found, width = floors(), 830
    parts, y = [text("imports go down, never up", 24, 30, "faint")], 46
    for number, names in zip(range(len(found), 0, -1), reversed(found), strict=True):
        rooms, x, row = [], 66, y
        for name in names:
            room = 8 * len(name) + 16
            if x + room > width - 34:
                x, row = 66, row + 30
            rooms += [rect("room", x, row + 5, room, 24, 3), text(name, x + room / 2, row + 21.5, "text code", "middle")]
            x += room + 6
        parts += [rect("floor", 56, y, width - 80, row + 34 - y, 4), *rooms]
        parts.append(text(str(number), 36, y + 22, "faint small", "middle"))
        y = row + 42
    parts.append(line(16, 46, 16, y - 10, arrow=True))
    return page(width, y + 8, "The floors of the package, from the command line down to errors and files", parts)


PICTURES = {"sharing.svg": sharing, "floors.svg": house}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name, draw in PICTURES.items():
        path, new = FOLDER / name, draw()
        if path.exists() and path.read_text() == new:
            continue
        stale = 1
        print(f"docs/pictures/{name}" + (" is out of date" if check else ""), file=sys.stderr)
        if not check:
            FOLDER.mkdir(exist_ok=True)
            path.write_text(new)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main())
