"""Grouped pointwise convolutions with interleaving, the rule of kEffNet (https://doi.org/10.13164/mendel.2022.1.023).

A 1x1 layer of C inputs and F outputs gets the largest number of groups g that divides both and leaves every group at
least ``min_channels`` inputs; with g = 1 it stays. Type 2 is the published one: K, interleave, and where C >= F also
L, added to K. Type 1 has no L, type 3 neither L nor the interleave.
"""

from __future__ import annotations

from typing import Any

from timm import layers as timm_layers
from torch import fx, nn

from sharefold.errors import SharefoldError
from sharefold.graph import LayerRecord, NetworkGraph
from sharefold.methods.grouped import pair_size
from sharefold.plans import GroupPlan
from sharefold.recipes.builders import Recipe, layer_form, nothing_fits, plain

NAME = "grouped-pointwise"
ACTIVATIONS = tuple(
    {
        cls
        for source in (nn.modules.activation, timm_layers.activations, timm_layers.activations_me)
        for cls in vars(source).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in (nn.Module, nn.MultiheadAttention)
    }
)


def build(model: nn.Module, graph: NetworkGraph, options: dict[str, Any]) -> list[GroupPlan]:
    kind, smallest = options["type"], options["min_channels"]
    if kind not in (1, 2, 3):
        raise SharefoldError(f"recipe {NAME}: type={kind}: choose 1 (no L), 2 (published) or 3 (no L, no interleave)")
    if smallest < 1:
        raise SharefoldError(f"recipe {NAME}: min_channels={smallest}: give 1 or more")
    activations = following_activations(model, graph)
    last = next(reversed(graph.layers), None)
    plans = []
    for record in graph.layers.values():
        if record.name == last or record.calls > 1 or not _is_pointwise(record) or not plain(model, record):
            continue
        form = layer_form(model, record.name)
        groups = group_count(form.in_channels, form.out_channels, smallest)
        if groups == 1 or form.standardize is not None:
            continue
        second = kind == 2 and form.in_channels >= form.out_channels
        norm = None if record.norm is None else model.get_submodule(record.norm)
        before, after = pair_size(form, groups, second, record.bias, norm)
        settings = {
            "groups": groups,
            "second": second,
            "shuffle": kind != 3,
            "norm": record.norm,
            "act": activations.get(record.name),
            "order": _may_reorder(graph, record),
        }
        plans.append(
            GroupPlan(record.name, "grouped", (record.name,), settings, before, after, None, record.stage, record.role)
        )
    if not plans:
        raise nothing_fits(NAME, f"no 1x1 convolution can be split into groups of {smallest} or more input channels")
    return plans


def group_count(inputs: int, outputs: int, smallest: int) -> int:
    """The largest common divisor of both widths that leaves a group at least ``smallest`` inputs, or 1."""
    limit = max(1, min(inputs, outputs, inputs // smallest))
    return next(g for g in range(limit, 0, -1) if inputs % g == 0 and outputs % g == 0)


def following_activations(model: nn.Module, graph: NetworkGraph) -> dict[str, str]:
    """Layer -> the activation module that alone consumes its output (or its norm's), if it is used only there."""
    if graph.fx_graph is None:
        return {}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.fx_graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    found = {}
    for record in graph.layers.values():
        nodes = calls.get(record.norm or record.name, [])
        if len(nodes) != 1 or len(nodes[0].users) != 1:
            continue
        user = next(iter(nodes[0].users))
        if user.op != "call_module" or len(calls[str(user.target)]) != 1:
            continue
        module = model.get_submodule(str(user.target))
        if isinstance(module, ACTIVATIONS) and not any(True for _ in module.parameters()):
            found[record.name] = str(user.target)
    return found


def _is_pointwise(record: LayerRecord) -> bool:
    return (
        record.kind == "conv2d" and record.weight_shape[2:] == (1, 1) and record.groups == 1 and record.role != "stem"
    )


def _may_reorder(graph: NetworkGraph, record: LayerRecord) -> bool:
    """Channels inside a block may be reordered for the layer that ends it; those of a residual stream may not."""
    space = graph.spaces.get(record.input_space)
    return record.role in ("project", "conv3") and space is not None and not space.frozen and not space.stream


GROUPED_POINTWISE = Recipe(
    NAME,
    "https://doi.org/10.13164/mendel.2022.1.023",
    {
        "min_channels": (16, "smallest number of input channels a group may have"),
        "type": (2, "2: K, interleave and L where the layer does not widen; 1: no L; 3: neither L nor interleave"),
    },
    build,
)
