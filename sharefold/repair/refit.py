"""Sequential refit: every converted layer's coefficients again, on the inputs that the converted network gives it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.graph import NetworkGraph
from sharefold.layers import Again, RepeatedBlock, SharedConv, fold_scale, resolve, shift_output, takes_scale
from sharefold.plans import GroupPlan
from sharefold.repair.lockstep import Place, Visited, batches_for, walk
from sharefold.repair.means import give_mean
from sharefold.repair.own_factors import has_own_factors, solve_on_prefix
from sharefold.repair.rectified import refit_rectified
from sharefold.repair.work import Work
from sharefold.running import evaluating
from sharefold.solvers.least_squares import PulledLeastSquares
from sharefold.solvers.pair_moments import PairMoments

# Pull towards the coefficients so far, as a share of the mean diagonal of the normal equations.
RIDGE = 1e-3
# Positions of all images together that a layer's normal equations are summed over: neighbours say much the same, and
# early layers have hundreds of thousands.
POSITIONS = 1 << 16


class Refit:
    """Solves the linear part of every shared layer again, in forward order, for the original layer's output.

    Of a layer that shares nothing all factors are solved again, as its group in the plan says.

    With a = F x~ the responses of the layer's filters on the converted prefix and y the original output, both centred:
    C = (Y A^T + rho C0)(A A^T + rho I)^-1; the difference of the means goes into the bias or the BatchNorm's mean.
    """

    name = "refit"

    def refusal(self, work: Work) -> str:
        if work.cal.graph.fx_graph is None:
            return "the network has no fx graph"
        if not _refittable(work.model, work.cal.graph):
            return "no layer has a linear part or a norm of its own"
        return ""

    @torch.no_grad()
    def run(self, work: Work) -> Mapping[str, Any]:
        original, model, graph = work.cal.original, work.model, work.cal.graph
        assert graph.fx_graph is not None
        layers = _refittable(model, graph)
        plans = {name: group for group in work.plan.groups for name in group.members}
        done = 0

        def visit(name: str, place: Place) -> None:
            nonlocal done
            _visit(Visited(original, model, name, graph.layers[name].norm, place), layers[name], plans.get(name))
            done += 1
            if work.progress:
                work.progress("refitting", done, len(layers))

        with evaluating(original, model):
            walk(graph.fx_graph, original, model, batches_for(original, work.cal.telling), visit, set(layers))
        return {"layers": done}


def _visit(at: Visited, layer: nn.Module, plan: GroupPlan | None) -> None:
    if not isinstance(layer, SharedConv) or layer.linear_part() is None:
        _rescale_layer(at)
        return
    if plan is not None and has_own_factors(layer, plan):
        solve_on_prefix(at, plan, positions=max(1, POSITIONS // sum(map(len, at.place.inputs))))
    _refit_layer(at)
    groups, kind, every = layer.form.groups, layer.form.kind, _spacing(at.place.targets, layer.form.out_channels)
    refit_rectified(at, partial(_columns, groups=groups, kind=kind, every=every), RIDGE)


def _refit_layer(at: Visited) -> None:
    layer = cast(SharedConv, at.layer)
    part = layer.linear_part()
    assert part is not None
    filters, coefficients = part  # (M, I/g, h, w), (O, M)
    groups, kind = layer.form.groups, layer.form.kind
    size, rows = len(filters), layer.form.out_channels // groups
    tiled = filters.repeat(groups, 1, 1, 1)
    every = _spacing(at.place.targets, rows * groups)
    pairs = PairMoments()
    for x, y in zip(at.place.inputs, at.place.targets, strict=True):
        pairs.add(_columns(layer.form.apply(x, tiled, None), groups, kind, every), _columns(y, groups, kind, every))
    found = pairs.result(centered=False)
    if found is None:
        return
    gram, cross = found.gram, found.cross
    if at.owner is not None:
        gram = gram - found.mean.unsqueeze(2) * found.mean.unsqueeze(1)
        cross = cross - found.mean_y.unsqueeze(2) * found.mean.unsqueeze(1)
    new = PulledLeastSquares(gram, RIDGE).solve(cross, coefficients.detach().cpu().reshape(groups, rows, size).to(gram))
    if new is None:
        return
    layer.set_linear_part(new.reshape(-1, size).to(coefficients))
    shift = (found.mean_y - (new @ found.mean.unsqueeze(2)).squeeze(2)).reshape(-1).to(coefficients)
    give_mean(at.original, at.model, layer, at.norm, shift)


def _refittable(model: nn.Module, graph: NetworkGraph) -> dict[str, nn.Module]:
    """Shared layers with a linear part, and layers of shared weights whose norm behind them is their own."""
    found: dict[str, nn.Module] = {}
    folded = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, RepeatedBlock | Again))
    for name, record in graph.layers.items():
        layer = resolve(model, name)
        if isinstance(layer, SharedConv) and layer.linear_part() is not None:
            found[name] = layer
        elif isinstance(layer, SharedConv) or (folded and name.startswith(folded)):
            norm = None if record.norm is None else resolve(model, record.norm)
            if norm is not None and takes_scale(norm):
                found[name] = layer
    return found


def _rescale_layer(at: Visited) -> None:
    """For a layer without tensors of its own: the best scale and offset per channel, in the norm behind it."""
    layer = at.layer
    linear = isinstance(layer, nn.Linear) or (isinstance(layer, SharedConv) and layer.form.kind == "linear")
    kind = "linear" if linear else "conv2d"
    targets = at.place.targets
    sums: list[Tensor] = []
    every = _spacing(targets, targets[0].shape[-1 if linear else 1])
    count = 0
    for x, y in zip(at.place.inputs, targets, strict=True):
        a, b = (_columns(t, 1, kind, every)[0].double() for t in (layer(x), y))
        part = torch.stack([a.sum(1), b.sum(1), (a * a).sum(1), (a * b).sum(1)])
        sums = [part] if not sums else [sums[0] + part]
        count += a.shape[1]
    mean_a, mean_y, square, cross = sums[0] / count
    variance = (square - mean_a.square()).clamp_min(0)
    scale = torch.where(variance > 0, (cross - mean_a * mean_y) / variance.clamp_min(1e-30), torch.ones_like(variance))
    old, new = (resolve(net, cast(str, at.norm)) for net in (at.original, at.model))
    new.load_state_dict(old.state_dict())
    shift_output(new, (mean_y - scale * mean_a).float())
    fold_scale(new, scale.float())


def _spacing(targets: list[Tensor], channels: int) -> int:
    """Distance between the positions taken: odd, so that the sampled columns of a map shift from row to row."""
    positions = sum(t.numel() for t in targets) // channels
    return max(1, positions // POSITIONS) // 2 * 2 + 1


def _columns(y: Tensor, groups: int, kind: str, every: int) -> Tensor:
    """(G, channels / G, samples) of a map (B, C, H, W) or of Linear outputs (..., C), each ``every``-th position."""
    if kind == "linear":
        flat = y.reshape(-1, y.shape[-1])[::every].T
    else:
        flat = y.flatten(2)[..., ::every].transpose(0, 1).flatten(1)
    # Sums of products of half-precision numbers leave their range.
    flat = flat.float() if flat.element_size() < 4 else flat
    return flat.reshape(groups, -1, flat.shape[1])
