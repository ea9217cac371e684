"""Whether a network runs its shared layers where they were put: some hold their layers in places that nobody can look into."""

from __future__ import annotations

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.preserved import tried
from sharefold.inputs import Input
from sharefold.layers import SharedConv
from sharefold.methods.contract import LayerSwap
from sharefold.methods.registry import step_named
from sharefold.plans import Plan
from sharefold.untrusted import quoted


def check_reached(model: nn.Module, graph: NetworkGraph, plan: Plan, example: Input) -> None:
    """Runs the converted ``model`` once on ``example``.

    Raises:
        SharefoldError: it fails, or does not run a shared layer whose dense one the network of ``graph`` ran; names it.
    """
    names = [name for group in plan.sharing if isinstance(step_named(group.method), LayerSwap) for name in group.members]
    layers = {name: model.get_submodule(name) for name in names if name in graph.layers and graph.layers[name].calls}
    waiting = {name for name, layer in layers.items() if isinstance(layer, SharedConv)}
    if not waiting:
        return
    handles = [
        layers[name].register_forward_pre_hook(lambda module, args, name=name: waiting.discard(name)) for name in sorted(waiting)
    ]
    try:
        _, error = tried(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if error:
        raise SharefoldError(
            f"the network fails once its layers are shared ({error}): it looks into layers for what shared ones do not have; "
            "exclude those"
        )
    if waiting:
        name = next(name for name in names if name in waiting)
        raise SharefoldError(
            f"layer {quoted(name)}: the network does not run it from there, but from a place that cannot be replaced (a method, "
            "or an object that holds it): exclude it"
        )
