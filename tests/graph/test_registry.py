"""Every family of timm's registry, on the meta device: nothing crashes, and what is reported is consistent."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from torch import nn

from sharefold.graph import NetworkGraph, analyze, find_groups

SMALL = re.compile(r"atto|femto|pico|nano|tiny|xxs|small|mobile|_050|_s0|_b0|_m0|_t0|18|_xs|_s\b|_0")


@lru_cache(maxsize=1)
def family_defaults() -> tuple[str, ...]:
    """One model of every timm module, a small one where the name tells."""
    chosen = []
    for module in sorted(timm.list_modules()):
        names = sorted(timm.list_models(module=module, pretrained=False))
        if names:
            chosen.append(next((name for name in names if SMALL.search(name)), names[0]))
    return tuple(chosen)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # some constructors read tensor values, which the meta device has not
        pytest.skip(f"cannot be built on the meta device: {type(error).__name__}")
    config: Any = model.pretrained_cfg
    size = config["input_size"]
    return model, torch.empty(1, *size, device="meta")


def conv_share(model: nn.Module) -> float:
    """Part of the parameters that lies in two-dimensional convolutions."""
    convs = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    return convs / max(1, sum(p.numel() for p in model.parameters()))


def check(model: nn.Module, graph: NetworkGraph) -> None:
    assert graph.layers
    modules = dict(model.named_modules())
    for name, record in graph.layers.items():
        weight = modules[name].weight
        shape = tuple(weight.shape) if record.kind == "conv2d" else (*weight.shape, 1, 1)
        assert record.weight_shape == shape
        assert record.calls >= 1 and record.stage >= 0 and record.role
        assert (record.block == "") == (record.block_index == -1)
        assert not record.block or name.startswith(f"{record.block}.")
        assert name not in graph.skipped
    seen = set(graph.layers) | set(graph.skipped)
    assert {n for n, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)} <= seen
    for space in graph.spaces.values():
        for name in space.writers:
            assert name not in graph.layers or graph.layers[name].out_channels == space.channels or space.frozen
    for group in find_groups(graph):
        assert {graph.layers[name].weight_shape for name in group.members} == {group.weight_shape}
    for repeat in graph.repeats:
        assert len(repeat.blocks) >= 2


@pytest.mark.sweep
@pytest.mark.parametrize("name", family_defaults())
def test_family(name: str) -> None:
    model, image = build(name)
    try:
        with torch.no_grad():
            model.eval()(image)
    except Exception as error:  # data-dependent forward code cannot run without values
        pytest.skip(f"cannot run on the meta device: {type(error).__name__}")
    graph = analyze(model, image)
    check(model, graph)
    if conv_share(model) > 0.5:
        assert graph.traced == "fx", graph.trace_note
