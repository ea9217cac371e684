"""The style sheet of the page: system fonts, light and dark, nothing fetched."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f5f6f8; --ink: #1b1f24; --faint: #5b6470; --rule: #d9dde3;
  --plain: #d3d8df; --accent: #2f55c0; --mark: #1b1f24; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e7eaee; --faint: #9aa4b1;
  --rule: #333a44; --plain: #3a424d; --accent: #8fb0ff; --mark: #ffffff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 44px 0 8px; }
p { margin: 0 0 14px; max-width: 72ch; }
.lead, .faint, figcaption, footer { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; margin: 26px 0 0; }
.tile { background: var(--card); border-radius: 8px; padding: 14px 16px; }
.tile .what { color: var(--faint); font-size: 14px; }
.tile .value { font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tile .more { font-size: 14px; color: var(--faint); font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--rule); vertical-align: middle; }
th { color: var(--faint); font-weight: 500; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td code, li code { font: 13px/1.4 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 8px; flex: none; }
.name { display: flex; align-items: center; min-width: 150px; overflow-wrap: anywhere; }
svg { display: block; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Arial, sans-serif; fill: var(--ink); }
svg text.tick, svg text.faint { fill: var(--faint); font-size: 11px; }
svg text.stage { font-size: 13px; font-weight: 600; }
svg.map { width: 100%; height: auto; margin-top: 14px; }
svg .plain { fill: var(--plain); }
svg .grid { stroke: var(--rule); }
svg .mark { stroke: var(--mark); stroke-dasharray: 4 3; }
.cell:hover rect { stroke: var(--ink); stroke-width: 1.5; }
.grid-of-charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px;
  margin-top: 14px; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px 12px 6px; min-width: 0; }
figure svg { width: 100%; height: auto; }
figcaption { font-size: 13px; overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-weight: 600; }
details { margin-top: 12px; } summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 52px; font-size: 13px; border-top: 1px solid var(--rule); padding-top: 14px; }
@media print { .tile, figure { border: 1px solid var(--rule); } }
"""
