"""Every published parameter count, from the plan alone and from the converted network."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
from nets import build
from networks import count
from torch import nn

from sharefold.calibration.images import input_config
from sharefold.graph import NetworkGraph, analyze
from sharefold.methods import step_named
from sharefold.recipes import RECIPES, build_plan

SYSTEMS = json.loads((Path(__file__).parent / "systems.json").read_text())
ROWS = [(recipe, row) for recipe in RECIPES for row in SYSTEMS[recipe]]


def text(value: object) -> str:
    return f"{value['source']}-{value['classes']}-{value.get('options', '')}" if isinstance(value, dict) else str(value)


@functools.cache
def known(source: str, **arguments: int) -> tuple[nn.Module, NetworkGraph]:
    """The network on the meta device, to be copied, and its graph: most of a test is reading that."""
    with torch.device("meta"):
        model = build(source, **arguments).eval()
    return model, analyze(model, torch.zeros(1, *input_config(model)["input_size"]))


@pytest.mark.parametrize(("recipe", "row"), ROWS, ids=text)
def test_published_count(recipe: str, row: dict) -> None:
    options = dict(row.get("options", {}))
    arguments = options if recipe == "layer-reuse" else {}  # there they are the network's, not the recipe's
    dense, graph = known(row["source"], num_classes=row["classes"], **arguments)
    model = copy.deepcopy(dense)
    plan = build_plan(recipe, model, graph=graph, options={} if arguments else options)
    assert plan.params_before == count(model) == row.get("before", count(model))
    assert plan.params_after == row["after"]
    before = plan.params_before
    for group in plan.groups:
        step_named(group.method).check(model, group)
        step_named(group.method).install(model, group, None)
        after = count(model)
        assert before - after == group.params_before - group.params_after
        before = after
    assert before == row["after"]


@pytest.mark.parametrize(
    ("recipe", "source", "arguments", "saved"),
    [
        # CIFAR-100 ResNet-34 of the paper: its stem differs from torchvision's, so the saving is what must agree
        ("filter-bases:shared=8,unique=1", "tv:resnet34", {}, 21_328_292 - 5_865_428),
        ("filter-bases:shared=16,unique=1", "tv:resnet34", {}, 21_328_292 - 6_485_844),
        ("filter-bases:shared=16,unique=0", "tv:resnet34", {}, 21_328_292 - 6_201_508),
        ("filter-bases:shared=0,unique=16", "tv:resnet34", {}, 21_328_292 - 9_510_052),
        ("filter-bases:tie=expand", "tv:mobilenet_v2", {}, 3_507_272 - 3_243_080),
        ("filter-bases:tie=expand+project", "tv:mobilenet_v2", {}, 3_507_272 - 2_978_888),
        ("kernel-sharing:stages=1", "timm:se_resnet14_cifar", {}, 2_771_290 - 2_697_562),
        ("kernel-sharing:stages=2+3", "timm:se_resnet26_cifar", {}, 5_892_954 - 1_469_274),
        ("grouped-pointwise:type=1", "timm:efficientnet_b0", {"num_classes": 10}, 4_020_358 - 627_206),
        ("grouped-pointwise:type=1", "timm:efficientnet_b4", {"num_classes": 10}, 17_566_546 - 1_910_674),
        ("sharesnet", "timm:wrn_28_10_cifar", {"num_classes": 10}, 36_536_884 - 26_860_084),
    ],
)
def test_other_published_savings(recipe: str, source: str, arguments: dict, saved: int) -> None:
    model, graph = known(source, **arguments)
    plan = build_plan(recipe, model, graph=graph)
    assert plan.params_before - plan.params_after == saved


@pytest.mark.parametrize("recipe", ["kernel-sharing", "layer-reuse"])
def test_convmixer_of_timm_shrinks_by_more_than_85_percent(recipe: str) -> None:
    with torch.device("meta"):
        model = build("timm:convmixer_768_32").eval()
    plan = build_plan(recipe, model)
    assert plan.params_after < 0.15 * plan.params_before
    for group in plan.groups:
        step_named(group.method).install(model, group, None)
    assert count(model) == plan.params_after
