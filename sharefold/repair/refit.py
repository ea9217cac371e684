"""Sequential refit: every converted layer's coefficients again, on the inputs that the converted network gives it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.graph import NetworkGraph
from sharefold.layers import Again, RepeatedBlock, SharedConv, fold_scale, resolve, takes_scale
from sharefold.measure import agreement, evaluating
from sharefold.plans import GroupPlan
from sharefold.repair.lockstep import Place, largest_map, walk
from sharefold.repair.own_factors import has_own_factors, solve_on_prefix
from sharefold.repair.rectified import refit_rectified

# Pull towards the coefficients so far, as a share of the mean diagonal of the normal equations.
RIDGE = 1e-3
# Positions of all images together that a layer's normal equations are summed over: neighbours say much the same, and
# early layers have hundreds of thousands.
POSITIONS = 1 << 16
# Activations of all images and both networks that may live at once.
MEMORY_BYTES = 2 << 30


@torch.no_grad()
def refit(
    original: nn.Module, model: nn.Module, graph: NetworkGraph, images: Tensor, held_out: Tensor,
    groups: Sequence[GroupPlan] = (), ridge: float = RIDGE, progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Solves the linear part of every shared layer again, in forward order, for the original layer's output.

    Of a layer that shares nothing all factors are solved again, as its plan among ``groups`` says.

    With a = F x~ the responses of the layer's filters on the converted prefix and y the original output, both centred:
    C = (Y A^T + rho C0)(A A^T + rho I)^-1; the difference of the means goes into the bias or the BatchNorm's mean.
    Kept only if KL(original || model) on ``held_out`` falls.

    Returns:
        {"kept": bool, "layers": int, "kl_before": float, "kl_after": float}; {"kept": False, "reason": str} when the
        network cannot be walked (no fx graph).
    """
    layers = _refittable(model, graph)
    if graph.fx_graph is None:
        return {"kept": False, "reason": "the network has no fx graph"}
    if not layers:
        return {"kept": False, "reason": "no layer has a linear part or a norm of its own"}
    before = agreement(original, model, held_out).kl
    saved = copy.deepcopy(model.state_dict())
    size = largest_map(original, images[:1])
    images = images[: max(8, MEMORY_BYTES // (4 * 8 * size))]
    batches = list(images.split(max(1, (1 << 26) // (4 * size))))
    plans = {name: group for group in groups for name in group.members}
    done = 0

    def visit(name: str, place: Place) -> None:
        nonlocal done
        layer, norm = layers[name], graph.layers[name].norm
        if isinstance(layer, SharedConv) and layer.linear_part() is not None:
            if has_own_factors(layer, plans.get(name)):
                centered = output_mean_owner(model, layer, norm) is not None
                places = max(1, POSITIONS // sum(map(len, place.inputs)))
                solve_on_prefix(original, model, name, norm, plans[name], centered, place.inputs, place.targets, places)
            _refit_layer(original, model, name, norm, place.inputs, place.targets, ridge)
            groups, kind, every = layer.form.groups, layer.form.kind, _spacing(place.targets, layer.form.out_channels)
            columns = partial(_columns, groups=groups, kind=kind, every=every)
            refit_rectified(original, model, name, norm, place, columns, ridge)
        else:
            _rescale_layer(original, model, name, cast(str, norm), place)
        done += 1
        if progress:
            progress("refitting", done, len(layers))

    with evaluating(original, model):
        walk(graph.fx_graph, original, model, batches, visit, set(layers))
    after = agreement(original, model, held_out).kl
    kept = after < before
    if not kept:
        model.load_state_dict(saved)
    return {"kept": kept, "layers": done, "kl_before": before, "kl_after": after}


def _refit_layer(
    original: nn.Module, model: nn.Module, name: str, norm: str | None, inputs: list[Tensor], targets: list[Tensor],
    ridge: float,
) -> None:  # fmt: skip
    layer = model.get_submodule(name)
    assert isinstance(layer, SharedConv)
    part = layer.linear_part()
    assert part is not None
    filters, coefficients = part  # (M, I/g, h, w), (O, M)
    groups, kind = layer.form.groups, layer.form.kind
    size, rows = len(filters), layer.form.out_channels // groups
    gram = torch.zeros(groups, size, size, dtype=torch.float64)
    cross = torch.zeros(groups, rows, size, dtype=torch.float64)
    mean_a, mean_y = torch.zeros(groups, size, dtype=torch.float64), torch.zeros(groups, rows, dtype=torch.float64)
    tiled = filters.repeat(groups, 1, 1, 1)
    every = _spacing(targets, rows * groups)
    count = 0
    for x, y in zip(inputs, targets, strict=True):
        a = _columns(layer.form.apply(x, tiled, None), groups, kind, every)
        b = _columns(y, groups, kind, every)
        gram += (a @ a.transpose(1, 2)).to(gram)
        cross += (b @ a.transpose(1, 2)).to(cross)
        mean_a += a.sum(2).to(mean_a)
        mean_y += b.sum(2).to(mean_y)
        count += a.shape[2]
    gram, cross, mean_a, mean_y = gram / count, cross / count, mean_a / count, mean_y / count
    owner = output_mean_owner(model, layer, norm)
    if owner is not None:
        gram -= mean_a.unsqueeze(2) * mean_a.unsqueeze(1)
        cross -= mean_y.unsqueeze(2) * mean_a.unsqueeze(1)
    rho = ridge * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]
    old = coefficients.reshape(groups, rows, size).to(gram)
    eye = torch.eye(size, dtype=gram.dtype)
    new = torch.linalg.solve(gram + rho * eye, (cross + rho * old).transpose(1, 2)).transpose(1, 2)
    layer.set_linear_part(new.reshape(-1, size).to(coefficients))
    shift = (mean_y - (new @ mean_a.unsqueeze(2)).squeeze(2)).reshape(-1).to(coefficients)
    inner = layer.bias  # what a norm inside of the layer adds, and the layer's own bias
    if owner is layer:
        assert layer.own_bias is not None and inner is not None
        layer.own_bias.add_(shift - inner)
    elif owner is not None:
        assert norm is not None
        shift = shift if inner is None else shift - inner
        owner.running_mean.copy_(original.get_submodule(norm).running_mean - shift)  # type: ignore[union-attr,operator]


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


def _rescale_layer(original: nn.Module, model: nn.Module, name: str, norm: str, place: Place) -> None:
    """For a layer without tensors of its own: the best scale and offset per channel, in the norm behind it."""
    layer = resolve(model, name)
    linear = isinstance(layer, nn.Linear) or (isinstance(layer, SharedConv) and layer.form.kind == "linear")
    kind = "linear" if linear else "conv2d"
    sums: list[Tensor] = []
    every = _spacing(place.targets, place.targets[0].shape[-1 if linear else 1])
    count = 0
    for x, y in zip(place.inputs, place.targets, strict=True):
        a, b = (_columns(t, 1, kind, every)[0].double() for t in (layer(x), y))
        part = torch.stack([a.sum(1), b.sum(1), (a * a).sum(1), (a * b).sum(1)])
        sums = [part] if not sums else [sums[0] + part]
        count += a.shape[1]
    mean_a, mean_y, square, cross = sums[0] / count
    variance = (square - mean_a.square()).clamp_min(0)
    scale = torch.where(variance > 0, (cross - mean_a * mean_y) / variance.clamp_min(1e-30), torch.ones_like(variance))
    old, new = (resolve(net, norm) for net in (original, model))
    new.load_state_dict(old.state_dict())
    offset = (mean_y - scale * mean_a).float()
    cast(Tensor, new.running_mean).sub_(offset)
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
    return flat.reshape(groups, -1, flat.shape[1])
