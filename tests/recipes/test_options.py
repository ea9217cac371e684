"""What a recipe refuses, and how."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import build
from networks import images, net
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.plans import Plan
from sharefold.recipes import RECIPES, build_plan, parse_recipe


def test_parse() -> None:
    assert parse_recipe("sharesnet") == ("sharesnet", {})
    name, options = parse_recipe("filter-bases: shared=16, unique=1,bases=2")
    assert name == "filter-bases" and RECIPES[name].read(options) == {
        "shared": 16, "unique": 1, "bases": 2, "tie": "none",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sharenet", "did you mean sharesnet"),
        ("nothing-like-it", "choose one of sharesnet"),
        ("filter-bases:rank=3", "unknown option 'rank'"),
        ("filter-bases:shared=many", "whole number"),
        ("filter-bases:shared=-1", "not negative"),
        ("filter-bases:shared", "is no option"),
        ("filter-bases:shared=1,shared=2", "given twice"),
        ("sharesnet:stages=1", "unknown option"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(SharefoldError, match=message) as error:
        parse_recipe(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("filter-bases:bases=3", "timm:resnet20_cifar", "bases=3"),
        ("filter-bases:shared=0,unique=0", "timm:resnet20_cifar", "no filters"),
        ("filter-bases:shared=1000", "timm:resnet20_cifar", "lower shared or unique"),
        ("filter-bases:tie=5x5", "tv:resnet50", "tie=5x5"),
        ("filter-bases:tie=3x3+3x3", "tv:resnet50", "different ones"),
        ("filter-bases:tie=expand", "timm:resnet20_cifar", "nothing in this network fits"),
        ("filter-bases", "tv:mobilenet_v2", "tie=expand"),
        ("kernel-sharing:stages=4", "timm:se_resnet14_cifar", "from 1 to 3"),
        ("kernel-sharing:stages=x", "timm:se_resnet14_cifar", "stages=x"),
        ("sharesnet:first_block=never", "timm:resnet20_cifar", "first_block=never"),
        ("sharesnet", "tv:mobilenet_v2", "nothing in this network fits"),
        ("layer-reuse", "timm:se_resnet14_cifar", "nothing in this network fits"),
        ("grouped-pointwise", "timm:resnet20_cifar", "nothing in this network fits"),
        ("grouped-pointwise:type=4", "timm:efficientnet_b0", "type=4"),
        ("grouped-pointwise:min_channels=0", "timm:efficientnet_b0", "min_channels=0"),
    ],
)
def test_refusals(text: str, source: str, message: str) -> None:
    with torch.device("meta"):
        model = build(source).eval()
    with pytest.raises(SharefoldError, match=message) as error:
        build_plan(text, model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_nothing_fits_a_network_without_blocks(recipe: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(SharefoldError, match="nothing in this network fits"):
        build_plan(recipe, model, torch.zeros(1, 3, 8, 8))


def test_filter_bases_leave_out_weights_that_are_standardised() -> None:
    model = net("std")
    with pytest.raises(SharefoldError, match="standardise their weights.*tie=3x3"):
        build_plan("filter-bases:shared=4", model, images(1))
    plain = nn.Conv2d(8, 8, 3, padding=1)
    model.stage1[1].conv2, model.stage1[2].conv2 = plain, copy.deepcopy(plain)
    groups = build_plan("filter-bases:shared=4", model, images(1)).groups
    assert [group.members for group in groups] == [("stage1.1.conv2", "stage1.2.conv2")]


def test_plan_survives_json() -> None:
    with torch.device("meta"):
        model = build("timm:efficientnet_b0").eval()
    plan = build_plan("grouped-pointwise", model)
    again = Plan.from_json(plan.to_json())
    assert again == plan and "grouped" in str(plan)


class Branches(nn.Module):
    """Two equal blocks side by side, not one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.sides = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)) for _ in range(2)
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head((self.sides[0](x) + self.sides[1](x)).mean((2, 3)))


def test_parallel_branches_are_no_iterations() -> None:
    with pytest.raises(SharefoldError, match="in sequence"):
        build_plan("layer-reuse", Branches(), torch.zeros(1, 3, 8, 8))


def test_longest_run() -> None:
    with torch.device("meta"):
        model = build("timm:resnet56_cifar").eval()
    members = [group.members for group in build_plan("layer-reuse:reuse=4", model).groups]
    assert members[0] == tuple(f"layer1.{i}" for i in range(4)) and [len(m) for m in members] == [4, 4, 4, 4, 4, 4]
