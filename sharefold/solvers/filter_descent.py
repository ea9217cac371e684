"""Descent to the best filters of :mod:`sharefold.solvers.variable_projection`, in coordinates in which it is quick."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sharefold.solvers.data_norm import Problem, eigen_psd, working_dtype
from sharefold.solvers.directions import orthonormal
from sharefold.solvers.lbfgs import minimize
from sharefold.solvers.variable_projection import SCALE_FLOOR, VariableProjection

# The scales are taken anew after so many iterations, then after twice as many, and so on.
FIRST_LEG = 10
# Of a solution in full precision after one in less.
LAST_STEPS = 4


class _Scaled:
    """Coordinates in which the Hessian is below the identity, and no direction that counts is far below it: filters times the
    roots of their coefficients' products, and of the largest moment of what the filters do not span.

    Of what they span there is nothing to gain, and moments are largest there. Filters times the roots of the moments themselves,
    as they would be scaled for given coefficients, leave short steps for all the rest: 60 shared and 6 own filters of ResNet-56's
    last stage came from an error of .201 to .146 in 15 iterations, in these coordinates to .139 (docs/log.md).
    """

    def __init__(self, work: VariableProjection, basis: Tensor, own: Tensor) -> None:
        self.work, self.shapes = work, (basis.shape, own.shape)
        filters, image = work.stack(basis, own), work._image(basis, own)
        found = work._solved(filters, image)
        assert found is not None
        mixed = found[1] * work.factors.sqrt()[:, None, None]
        count = own.shape[1] * work.wide
        shared = torch.einsum("emo,eno->mn", mixed[:, count:], mixed[:, count:])
        each = mixed[:, :count].reshape(work.layers, work.groups, own.shape[1], work.wide, mixed.shape[2])
        private = torch.einsum("lgrwo,lgswo->lrs", each, each)
        left = work.largest_left(filters, image)
        amounts = mixed[:, count:].square().sum((1, 2))
        mean = (amounts @ left) / amounts.sum().clamp_min(torch.finfo(left.dtype).tiny)
        self.left = _roots(shared, mean)
        self.own_left = _roots(private, left.view(work.layers, work.groups).amax(1)[:, None, None])

    def pack(self, basis: Tensor, own: Tensor) -> Tensor:
        return torch.cat([(self.left[0] @ basis).flatten(), (self.own_left[0] @ own).flatten()])

    def unpack(self, point: Tensor) -> tuple[Tensor, Tensor]:
        size = self.shapes[0].numel()
        return self._mapped(point[:size].view(self.shapes[0]), point[size:].view(self.shapes[1]))

    def slope(self, basis: Tensor, own: Tensor) -> Tensor:
        """Of slopes in the filters, those in the scaled ones."""
        return torch.cat([t.flatten() for t in self._mapped(basis, own)])

    def _mapped(self, basis: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        # The roots are symmetric, so that filters come back, and slopes go, by the same map.
        own = self.own_left[1] @ own
        return self.left[1] @ basis, own if self.work.mask is None else own * self.work.mask


def _roots(gram: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Root and inverse root of twice ``gram`` (..., M, M) times ``factor``; both symmetric."""
    if not gram.numel():
        return gram, gram
    values, axes = eigen_psd(2 * gram, SCALE_FLOOR)
    root, turned = (values * factor.squeeze(-1)).sqrt().unsqueeze(-2), axes.transpose(-1, -2)
    return (axes * root) @ turned, (axes / root) @ turned


def refine(
    work: VariableProjection, basis: Tensor, own: Tensor, *, iterations: int = 40, tol: float = 1e-4, fixed: bool = False
) -> tuple[Tensor, Tensor, list[float]]:
    """Lowers the error from these filters; the answer is never worse.

    Args:
        basis: (R, N), R may be 0.
        own: (L, r, J), r may be 0.
        iterations: of L-BFGS, an evaluation each.
        tol: stop when two iterations on end lower the error by less than this fraction.
        fixed: whether the shared filters stay as they are.

    Returns:
        Filters of the same shapes with orthonormal rows, and the objective from the start on.
    """
    history: list[float] = []
    leg = FIRST_LEG
    while iterations > 0 and (basis.numel() or own.numel()):
        scaled = _Scaled(work, basis, own)
        function, start = partial(_scaled_value, work, scaled, fixed), scaled.pack(basis, own)
        point, values = minimize(function, start, iterations=min(leg, iterations), tol=tol)
        assert values[-1] <= values[0]
        if history and values[-1] > history[-1]:  # no gain beyond the rounding on the way to orthonormal rows and back
            break
        history += values[1 if history else 0 :]
        moved, own = (orthonormal(rows) for rows in scaled.unpack(point))
        basis = basis if fixed else moved
        if len(values) <= leg:  # it has stopped by itself
            break
        iterations, leg = iterations - leg, 2 * leg
    return basis, own, history or [work.evaluate(basis, own)[0]]


def _scaled_value(work: VariableProjection, scaled: _Scaled, fixed: bool, point: Tensor) -> tuple[float, Tensor]:
    value, slope, own_slope = work.evaluate(*scaled.unpack(point))
    return value, scaled.slope(torch.zeros_like(slope) if fixed else slope, own_slope)


def fitted(
    problem: Problem, sizes: tuple[int, int], *, iterations: int, tol: float, init: Tensor | None = None, **how: Any
) -> tuple[VariableProjection, Tensor, Tensor, list[float]]:
    """Filters for ``problem``, the most part of the way in as little precision as estimates need, the last steps in full.

    Args:
        sizes: (R, r), how many shared and own filters.
        iterations, tol: of :func:`refine`; with 0 iterations the start is kept.
        init: shared filters (R, N) to start from, with orthonormal rows.
        how: further arguments of :class:`VariableProjection`.

    Returns:
        The problem in full precision, shared filters (R, N), own filters (L, r, J), and the objective at the start and in the
        last steps.
    """
    work = VariableProjection(problem, **how)
    full = work.problem.weights
    less = working_dtype(problem.columns, problem.weights.dtype, estimate=True) != full.dtype and iterations > LAST_STEPS
    rough = VariableProjection(problem.for_estimates(), **how) if less else work
    if init is None:
        start = rough.start(*sizes)
    else:
        init = init.to(rough.problem.weights)
        start = init, rough.start_own(sizes[1], init)
    basis, own, history = refine(rough, *start, iterations=iterations, tol=tol)
    if rough is work:
        return work, basis, own, history
    first = work.evaluate(*(orthonormal(part.to(full)) for part in start))[0]
    basis, own, history = refine(work, orthonormal(basis.to(full)), orthonormal(own.to(full)), iterations=LAST_STEPS, tol=tol)
    return work, basis, own, [max(first, history[0]), *history]
