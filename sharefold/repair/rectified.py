"""Coefficients for what a ReLU lets through.

Where the original's value in front of a ReLU is negative, any negative value does as well. Least squares does not know
that and spends the layer's few filters on hitting it (nonlinear reconstruction: Zhang et al., "Accelerating Very Deep
Convolutional Networks for Classification and Detection", https://arxiv.org/abs/1505.06798, section 3.2). Here a value
that is rightly negative becomes its own target, the others keep theirs, and coefficients are solved again. Each round
lowers the squared error of all that should pass the ReLU and of all that passes it and should not.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from sharefold.graph.ops import ADDITIONS, op_name
from sharefold.layers import SharedConv, affine, resolve, shift_output
from sharefold.repair.lockstep import Place, Visited
from sharefold.solvers.least_squares import PulledLeastSquares

# More of them fit the calibration images' own ReLU pattern, and hardly lower the error.
ROUNDS = 4
# Floats of responses and outputs that are kept for the rounds; fewer positions count where there would be more.
ELEMENTS = 1 << 24
# A channel whose scale in the norm is this small against the others' keeps its linear solution: nothing of it passes.
SMALLEST_SCALE = 1e-3

Values = Callable[[fx.Node], "list[Tensor] | None"]
Columns = Callable[[Tensor], Tensor]  # a map or rows of a layer's outputs -> (G, O / G, positions)


@dataclass(frozen=True)
class Rectified:
    """What lies between a layer and a ReLU: the norm's scale and shift (O,), and what is added behind it, a tensor a batch."""

    scale: Tensor
    shift: Tensor
    addend: list[Tensor] | None


def rectified(model: nn.Module, place: Place, norm: str | None, values: Values) -> Rectified | None:
    """What stands between the layer at ``place`` and the ReLU behind it; None where something else does, or no ReLU is.

    Args:
        model: the network whose norm is asked, in eval mode.
        norm: name of the norm that belongs to the layer.
        values: of other nodes in ``model``, :meth:`Place.teacher` or :meth:`Place.student`.
    """
    last, scale, shift = place.node, torch.ones(()), torch.zeros(())
    if norm is not None:
        found, behind = resolve(model, norm), _behind(last, model)
        activation = getattr(found, "act", nn.Identity())  # of timm's BatchNormAct2d
        if behind is None or behind.target != norm or getattr(found, "running_var", None) is None:
            return None
        last, (scale, shift) = behind, affine(found)
        if not isinstance(activation, nn.Identity):
            return Rectified(scale, shift, None) if isinstance(activation, nn.ReLU) else None
    behind = _behind(last, model)
    if behind is not None and _is_relu(behind, model):
        return Rectified(scale, shift, None)
    if behind is None or not _calls(behind, ADDITIONS) or len(behind.all_input_nodes) != 2 or "alpha" in behind.kwargs:
        return None
    after, others = _behind(behind, model), [n for n in behind.all_input_nodes if not _leads_to(last, n, model)]
    if after is None or len(others) != 1 or not _is_relu(after, model):
        return None
    addend = values(others[0])
    if addend is None or any(getattr(r, "shape", None) != y.shape for r, y in zip(addend, place.targets, strict=True)):
        return None
    return Rectified(scale, shift, addend)


@torch.no_grad()
def refit_rectified(at: Visited, columns: Columns, ridge: float) -> None:
    """Solves the coefficients of the layer for its output behind the ReLU, from those it has.

    With z = s (C a + d) + t + r in front of the ReLU (a responses of the filters, s and t the norm's, r the addend) and z0
    the original's, with its own r: z0 where z0 > 0, else min(z, 0), is what C and d are fitted to, by least squares with the
    pull of :class:`sharefold.repair.refit.Refit`. So the last layer of a residual block also makes up for the error that
    came through its shortcut.
    """
    layer, place, owner = cast(SharedConv, at.layer), at.place, at.owner
    part = layer.linear_part()
    wanted = rectified(at.original, place, at.norm, place.teacher)
    given = rectified(at.model, place, at.norm, place.student)
    if owner is None or part is None or wanted is None or given is None:
        return
    filters, groups = part[0].repeat(layer.form.groups, 1, 1, 1), layer.form.groups

    positions = len(place.targets) * columns(place.targets[0]).shape[2]
    every = -(-(len(filters) + 3 * layer.form.out_channels) * positions // ELEMENTS)

    def taken(maps: Iterable[Tensor]) -> Tensor:
        return torch.cat([columns(y)[..., ::every] for y in maps], 2)

    def rows(values: Tensor) -> Tensor:
        """(O,) or () -> (G, O / G, 1), in the type of the columns."""
        return values.to(responses).expand(layer.form.out_channels).reshape(groups, -1, 1)

    responses = taken(layer.form.apply(x, filters, None) for x in place.inputs)
    target = rows(wanted.scale) * taken(place.targets) + rows(wanted.shift)
    offset = rows(given.shift).expand(target.shape)
    if wanted.addend is not None and given.addend is not None:
        target, offset = target + taken(wanted.addend), offset + taken(given.addend)
    scale = rows(given.scale)
    usable = scale.abs() > SMALLEST_SCALE * scale.abs().mean()
    scale = torch.where(usable, scale, torch.ones_like(scale))
    inner = torch.zeros(()) if layer.bias is None else layer.bias

    mean = responses.mean(2, keepdim=True)
    centred = responses - mean
    gram = (centred @ centred.transpose(1, 2)).double() / centred.shape[2]
    system = PulledLeastSquares(gram, ridge)
    factor = system.factored()
    if factor is None:  # responses that are not finite
        return
    first = coefficients = part[1].to(responses).reshape(groups, -1, gram.shape[1])
    before = constant = rows(inner)
    for _ in range(ROUNDS):
        found = scale * (coefficients @ responses + constant) + offset
        aim = (torch.where(target > 0, target, found.clamp_max(0)) - offset) / scale
        mean_y = aim.mean(2, keepdim=True)
        cross = ((aim - mean_y) @ centred.transpose(1, 2)).double() / centred.shape[2]
        solved = torch.cholesky_solve(system.right(cross, first.double()), factor).transpose(1, 2).to(first)
        coefficients = torch.where(usable, solved, first)
        constant = torch.where(usable, mean_y - coefficients @ mean, before)
    layer.set_linear_part(coefficients.reshape(-1, gram.shape[1]).to(part[1]))
    shift_output(owner, (constant - before).reshape(-1).to(part[1]))


def _behind(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The one node that uses this one's value, whatever does nothing in eval mode left out; None if there are several."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _idle(node, model):
            return node
    return None


def _leads_to(node: fx.Node, other: fx.Node, model: nn.Module) -> bool:
    """Whether ``other`` is ``node``, or is it with nothing but idle modules between."""
    while other is not node and _idle(other, model):
        other = other.all_input_nodes[0]
    return other is node


def _idle(node: fx.Node, model: nn.Module) -> bool:
    idle = nn.Identity | nn.Dropout | nn.Dropout2d
    return node.op == "call_module" and isinstance(resolve(model, str(node.target)), idle)


def _is_relu(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(resolve(model, str(node.target)), nn.ReLU)
    return _calls(node, {"relu"})


def _calls(node: fx.Node, names: Container[str]) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node) in names
