"""Exact trainable parameters of every network that the published tables name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

import sharefold.models  # noqa: F401  (registers the networks)

SYSTEMS = json.loads((Path(__file__).parents[1] / "recipes" / "systems.json").read_text())


def _cases() -> list[tuple[str, int, tuple[tuple[str, int], ...], int]]:
    cases = set()
    for system, entries in SYSTEMS.items():
        for entry in entries if isinstance(entries, list) else []:
            name = entry["source"].removeprefix("timm:")
            if not (name.endswith("_cifar") or name.startswith("lrunet")):
                continue
            options = tuple(entry["options"].items()) if system == "layer-reuse" else ()
            cases.add((name, entry["classes"], options, entry["after" if name == "lrunet" else "before"]))
    return sorted(cases)


@pytest.mark.parametrize(("name", "classes", "options", "expected"), _cases())
def test_published_count(name: str, classes: int, options: tuple[tuple[str, int], ...], expected: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes, **dict(options))
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20_cifar", 269_722),
        ("resnet44_cifar", 658_586),
        ("resnet110_cifar", 1_727_962),
    ],
)
def test_other_depths(name: str, expected: int) -> None:
    """Counts of the CIFAR ResNets that no recipe table names (0.27, 0.66 and 1.7 M in the original paper)."""
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == expected


@pytest.mark.parametrize(
    ("classes", "chans", "width", "reuse", "expected"),
    [
        (10, 3, 1, 10, 183_242),
        (10, 3, 1, 14, 206_282),
        (10, 3, 2, 1, 467_786),
        (100, 3, 1, 14, 229_412),
        (100, 3, 2, 8, 594_596),
        (10, 1, 1, 1, 130_250),
        (10, 1, 1, 10, 182_090),
    ],
)
def test_lrunet_table(classes: int, chans: int, width: int, reuse: int, expected: int) -> None:
    """Further cells of the layer-reuse table: CIFAR-10, CIFAR-100 and one-channel Fashion-MNIST."""
    model = timm.create_model("lrunet", num_classes=classes, in_chans=chans, width=width, reuse=reuse)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.state_dict().values()) - sum(
        b.numel() for b in model.buffers()
    )
