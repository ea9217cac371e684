"""Sequential refit of the layers that read folded channels, on the inputs that the converted network gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.pairs import Gatherer
from sharefold.layers import form_of
from sharefold.measure import evaluating
from sharefold.methods.fold import recorded, space_of
from sharefold.repair.lockstep import Place, batches_for, walk
from sharefold.repair.work import Work
from sharefold.solvers.least_squares import PulledLeastSquares

# Pull towards the weights so far: this share of the inputs' mean variance, and more where there are few positions an input.
RIDGE, FEW = 1e-3, 0.05
# Positions of all images together.
POSITIONS = 1 << 16


class FoldedReaders:
    """Solves every dense reader of folded channels again, in forward order, for what the original's layer puts out.

    When channels were left out its weights were solved for the original's inputs; now errors of the layers before it count too.
    """

    name = "fold"

    def refusal(self, work: Work) -> str:
        if not work.plan.narrowing:
            return "nothing is folded"
        if work.cal.graph.fx_graph is None:
            return "the network has no fx graph"
        return "" if _readers(work) else "every layer that reads folded channels is shared or factored"

    @torch.no_grad()
    def run(self, work: Work) -> Mapping[str, Any]:
        original, model, graph = work.cal.original, work.model, work.cal.graph
        assert graph.fx_graph is not None
        rows: dict[str, Tensor] = {}
        for group in work.plan.narrowing:
            space = space_of(group)
            rows.update(dict.fromkeys((space.writer, *space.gates), recorded(group)))
        readers, done = _readers(work), 0

        def visit(name: str, place: Place) -> None:
            nonlocal done
            _solve(original, model, name, graph.layers[name].norm, place, rows.get(name))
            done += 1
            if work.progress:
                work.progress("refitting", done, len(readers))

        with evaluating(original, model):
            walk(graph.fx_graph, original, model, batches_for(original, work.cal.telling), visit, readers)
        return {"layers": done}


def _readers(work: Work) -> set[str]:
    names = {name for group in work.plan.narrowing for name in space_of(group).readers}
    return {name for name in names if form_of(work.model.get_submodule(name)) is not None}


def _solve(original: nn.Module, model: nn.Module, name: str, norm: str | None, place: Place, rows: Tensor | None) -> None:
    """The best weight and constant on the converted prefix; ``rows`` of the original's outputs are still there."""
    layer = model.get_submodule(name)
    form = form_of(layer)
    assert form is not None
    images = sum(map(len, place.inputs))
    gatherer = Gatherer(form, 1, 0, max(1, POSITIONS // images))
    axis = -1 if form.kind == "linear" else 1
    for x, y in zip(place.inputs, place.targets, strict=True):
        gatherer.add(x, y if rows is None else y.index_select(axis, rows.to(y.device)))
    owner = output_mean_owner(model, layer, norm)
    found = gatherer.result(centered=owner is not None)
    if found is None:
        return
    gram, cross = found.gram[0].double(), found.cross[0].double()
    weight = cast(Tensor, layer.weight)
    samples = sum(t.numel() for t in place.targets) / place.targets[0].shape[axis]
    system = PulledLeastSquares(gram, RIDGE + FEW * len(gram) / min(samples, POSITIONS))
    solved = system.robust(cross, weight.flatten(1).to(cross))
    constant = found.mean_y[0] - solved @ found.mean[0].to(solved)
    if not bool(torch.isfinite(solved).all()):
        return
    weight.copy_(solved.reshape(weight.shape))
    if owner is layer:
        cast(Tensor, layer.bias).copy_(constant)
    elif owner is not None and norm is not None:
        theirs, ours = (cast(Tensor, net.get_submodule(norm).running_mean) for net in (original, model))
        theirs = theirs if rows is None else theirs[rows.to(theirs.device)]
        ours.copy_(theirs - constant.to(theirs))
