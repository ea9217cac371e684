"""Whether a network runs its shared layers as it ran the dense ones: some hold their layers in places that nobody can look into,
and some treat layers by their class."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.preserved import tried
from sharefold.inputs import Input
from sharefold.layers import SharedConv, running, to_dense
from sharefold.methods.contract import LayerSwap
from sharefold.methods.registry import step_named
from sharefold.outputs.leaves import tensors_of
from sharefold.plans import Plan
from sharefold.untrusted import quoted

# Differences above this share of the size are not rounding, which some functions (sign, argmax) enlarge. Of half precision
# nothing is said.
ROUNDING = 0.05
_PRECISE = (torch.float32, torch.float64)


def check_reached(model: nn.Module, graph: NetworkGraph, plan: Plan, example: Input) -> None:
    """Runs the converted ``model`` once on ``example``, and once more with stock layers of the same weights.

    Raises:
        SharefoldError: it fails, does not run a shared layer whose dense one the network of ``graph`` ran, or does something else
            with shared layers than with stock ones; names the layer.
    """
    names = [name for group in plan.sharing if isinstance(step_named(group.method), LayerSwap) for name in group.members]
    layers = {name: model.get_submodule(name) for name in names if name in graph.layers and graph.layers[name].calls}
    expected = [name for name, layer in layers.items() if isinstance(layer, SharedConv)]
    if not expected:
        return
    with running(model, "composed"):
        error, met, said = _watched(model, expected, example)
    if error:
        raise SharefoldError(
            f"the network fails once its layers are shared ({error}): it looks into layers for what shared ones do not have; "
            "exclude those"
        )
    unmet = next((name for name in expected if name not in met), None)
    if unmet is not None:
        raise SharefoldError(
            f"layer {quoted(unmet)}: the network does not run it from there, but from a place that cannot be replaced (a method, "
            "or an object that holds it): exclude it"
        )
    error, stock, wanted = _watched(to_dense(model), expected, example)
    if error:  # what it does not do with shared layers is the same question
        stock = {}
    wrong = next((name for name in expected if not _alike(met[name], stock.get(name, []))), None)
    if wrong is not None or not _alike(said, wanted):
        where = "on the way to its outputs" if wrong is None else f"on the way to layer {quoted(wrong)}"
        raise SharefoldError(
            f"the network does something else with shared layers than with stock ones {where}: it asks layers for their class "
            "(isinstance): exclude those that it asks"
        )


def _watched(model: nn.Module, names: Collection[str], example: Input) -> tuple[str, dict[str, list[Tensor]], list[Tensor]]:
    """The error of a run, the inputs of the layers that it met, and the tensors that it returned."""
    met: dict[str, list[Tensor]] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            met.setdefault(name, []).extend(arg.detach().clone() for arg in args if isinstance(arg, Tensor))

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        output, error = tried(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return error, met, list(tensors_of(output).values())


def _alike(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether numbers are the same but for rounding. Of outputs the order may change, and how many there are (detections)."""
    if len(ours) != len(theirs):
        return False
    return all(_close(a, b) for a, b in zip(ours, theirs, strict=True) if a.shape == b.shape and a.dtype in _PRECISE)


def _close(a: Tensor, b: Tensor) -> bool:
    first, second = (tensor.flatten().double().sort().values for tensor in (a, b))
    return not bool((first - second).norm() > ROUNDING * second.norm())
