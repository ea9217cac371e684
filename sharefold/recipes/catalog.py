"""Every recipe, one line each, and the way from a recipe's text to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sharefold.calibration.images import input_config
from sharefold.errors import SharefoldError, unknown
from sharefold.graph import NetworkGraph, analyze
from sharefold.inputs import Tensors
from sharefold.plans import Plan
from sharefold.recipes.builders import Recipe
from sharefold.recipes.deeply_shared_bases import FILTER_BASES
from sharefold.recipes.grouped_pointwise import GROUPED_POINTWISE
from sharefold.recipes.kernel_sharing import KERNEL_SHARING
from sharefold.recipes.layer_reuse import LAYER_REUSE
from sharefold.recipes.sharesnet import SHARESNET

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        SHARESNET,  # one 3x3 a stage: https://arxiv.org/abs/1702.08782
        KERNEL_SHARING,  # every isomorphic convolution of a stage: https://arxiv.org/abs/2210.14151
        FILTER_BASES,  # shared and own filters, norm, coefficients: https://arxiv.org/abs/2006.05066
        LAYER_REUSE,  # one block run N times: https://arxiv.org/abs/1901.09615
        GROUPED_POINTWISE,  # grouped 1x1 pairs: https://doi.org/10.13164/mendel.2022.1.023
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        SharefoldError: there is none; names the nearest.
    """
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]


def parse_recipe(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME[:k=v,...]``; values keep their text, the recipe gives them types.

    Raises:
        SharefoldError: unknown recipe or option, a part without "=", a value that does not fit.
    """
    name, _, rest = text.partition(":")
    recipe = recipe_named(name.strip())
    options: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise SharefoldError(f"recipe {name}: {part!r} is no option: write {name}:key=value,key=value")
        if key in options:
            raise SharefoldError(f"recipe {name}: {key} is given twice: give it once")
        options[key] = value
    recipe.read(options)
    return recipe.name, options


def build_plan(
    name: str, model: nn.Module, example_input: Tensors | None = None, graph: NetworkGraph | None = None,
    options: Mapping[str, Any] | None = None,
) -> Plan:  # fmt: skip
    """The plan that the recipe ``name`` (or ``NAME:k=v,...``) makes for ``model``, which is not changed.

    Args:
        model: a dense network with any weights, on any device, the meta device included.
        example_input: (1, C, H, W) for tracing, or a tuple of tensors; by default zeros of the size in the model's
            ``pretrained_cfg``.
        graph: reused when given.
        options: the recipe's options; they win over those in ``name``.

    Raises:
        SharefoldError: unknown recipe or option, or nothing in the network fits.
    """
    name, written = parse_recipe(name)
    recipe = recipe_named(name)
    values = recipe.read({**written, **(options or {})})
    if graph is None:
        if example_input is None:
            example_input = torch.zeros(1, *input_config(model)["input_size"])
        graph = analyze(model, example_input)
    groups = recipe.build(model, graph, values)
    before = sum(p.numel() for p in model.parameters())
    after = before - sum(group.params_before - group.params_after for group in groups)
    text = ",".join(f"{key}={value}" for key, value in {**written, **(options or {})}.items())
    return Plan(groups, before, after, f"recipe {name}{':' if text else ''}{text}")
