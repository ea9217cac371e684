"""The demonstration's picture: accuracy against size, and the shared filters themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sharefold.demo.results import Demo
from sharefold.layers import Bank, BasisConv, shared_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"average": "#c0504d", "basis": "#4f81bd", "auto": "#2e7d32"}
MARKERS = {"average": "s", "basis": "o", "auto": "^"}


def draw(demo: Demo, model: nn.Module, path: Path) -> None:
    """Writes a PNG of about 1300 x 520 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _curves(left, demo)
    _filters(right, model)
    figure.savefig(path)


def _curves(axes: Axes, demo: Demo) -> None:
    dense, tuned = demo.rows[0], demo.rows[-1]
    axes.axhline(100 * dense.top1, color="0.5", linestyle="--", linewidth=1)
    axes.text(99, 100 * dense.top1 - 1.5, f"original {dense.top1:.1%}", color="0.35", ha="right", va="top", fontsize=9)
    for method, points in demo.curve.items():
        x, y = [100 * size for size, _ in points], [100 * top1 for _, top1 in points]
        axes.plot(x, y, color=COLORS[method], marker=MARKERS[method], label=method, markersize=5)
    axes.plot(100 * tuned.size, 100 * tuned.top1, "*", color="#e0a000", markersize=15, markeredgecolor="0.2",
              label=f"{tuned.method} at {tuned.size:.0%}, {tuned.step}: {tuned.top1:.1%}")  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(0, 104), xlabel="parameters kept [%]", ylabel="test images classified rightly [%]")
    axes.set_title("Sharing a trained network, without labels", fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)


def _filters(axes: Axes, model: nn.Module) -> None:
    """One slice of every shared filter of the largest bank: that of the input channel where the filter is strongest.

    The filters drawn are the principal ones, of what all layers make of the bank; one bank has many equivalent bases.
    """
    members: dict[Bank, list[BasisConv]] = {}
    for layer in shared_layers(model).values():
        if isinstance(layer, BasisConv) and layer.bank is not None and not layer.own_columns:
            members.setdefault(layer.bank, []).append(layer)
    axes.axis("off")
    if not members:
        axes.set_title("no basis in this network", fontsize=11)
        return
    layers = max(members.values(), key=lambda layers: layers[0].rank)
    weights = torch.cat([layer.weight.detach().cpu().flatten(1) for layer in layers])
    basis = torch.linalg.svd(weights, full_matrices=False).Vh[: layers[0].rank].unflatten(1, layers[0].weight.shape[1:])
    strongest = basis.flatten(2).norm(dim=2).argmax(1)
    slices = basis[torch.arange(len(basis)), strongest]
    slices = slices / slices.abs().amax((1, 2), keepdim=True)
    columns = 10
    rows = -(-len(slices) // columns)
    height, width = slices.shape[1:]
    sheet = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), float("nan"))
    for index, tile in enumerate(slices):
        top, side = index // columns * (height + 1), index % columns * (width + 1)
        sheet[top : top + height, side : side + width] = tile
    axes.imshow(sheet.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(f"{len(basis)} filters, shared by {len(layers)} layers\n(strongest channel of each)", fontsize=11)
