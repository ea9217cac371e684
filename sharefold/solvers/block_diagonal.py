"""Grouped pointwise pair in place of a dense 1x1 convolution (the form of kEffNet, MENDEL 2022).

``W x ~ L interleave(K x) + K x`` with both ``K`` and ``L`` split into g groups, or ``W x ~ interleave(K x)`` where
the layer expands. The published networks train the pair from scratch; here it is fitted to a trained matrix under
the data norm, by alternating least squares. BatchNorm or activations that a network puts in between are not
modelled: the fit is a start for calibration and fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.options import chosen
from sharefold.solvers.cg import LinearSystem, conjugate_gradient
from sharefold.solvers.data_norm import Problem, eigen_psd, moment_floors, solve_psd
from sharefold.solvers.solve_options import SolveOptions


@dataclass(frozen=True)
class PairOptions(SolveOptions):
    """Alternations of the two factors.

    Attributes:
        cg_steps: conjugate-gradient steps of every update of the first.
    """

    rounds: int = 20
    cg_steps: int = 10


@dataclass
class GroupedSolution:
    """The fitted pair of every layer.

    Attributes:
        first: (K, F, C / g), weights of the first grouped convolution.
        second: (K, F, F / g), weights of the second one, or None for the interleave-only form.
        groups: g.
        errors: relative data-norm errors (K,).
        history: the objective (weighted squared errors, summed) in the given channel order; non-increasing.
        input_order: (K, C) int64: the pair's input channel c is the layer's old channel ``input_order[k, c]``; None
            if inputs were not free.
        output_order: (K, F) int64, likewise for the channels it writes.
    """

    first: Tensor
    second: Tensor | None
    groups: int
    errors: Tensor
    history: list[float] = field(default_factory=list)
    input_order: Tensor | None = None
    output_order: Tensor | None = None

    @property
    def approximation(self) -> Tensor:
        """The composed matrices (K, F, C) in the pair's own channel order."""
        return compose(self.first, self.second, self.groups)


def cost(outputs: int, inputs: int, groups: int, second: bool | None = None) -> int:
    """Parameters of one pair, BatchNorm not counted; ``second=None`` follows the published rule inputs >= outputs."""
    if second is None:
        second = inputs >= outputs
    return outputs * inputs // groups + int(second) * (outputs * outputs // groups)


def interleave_order(channels: int, groups: int) -> Tensor:
    """Channel m of the interleaved map is channel ``order[m]`` of the grouped map (a channel shuffle)."""
    return torch.arange(channels).reshape(groups, channels // groups).T.flatten()


def expand(weights: Tensor, groups: int) -> Tensor:
    """Dense block-diagonal matrices (K, F, C) of grouped weights (K, F, C / g)."""
    members, rows, width = weights.shape
    dense = weights.new_zeros(members, groups, rows // groups, groups, width)
    blocks = weights.reshape(members, groups, rows // groups, width)
    dense.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
    return dense.reshape(members, rows, groups * width)


def extract(dense: Tensor, groups: int) -> Tensor:
    """The diagonal blocks (K, F, C / g) of dense matrices (K, F, C)."""
    members, rows, columns = dense.shape
    split = dense.reshape(members, groups, rows // groups, groups, columns // groups)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(members, rows, columns // groups)


def _by_group(value: Tensor, groups: int) -> Tensor:
    return value.reshape(value.shape[0], groups, value.shape[1] // groups, value.shape[2])


def compose(first: Tensor, second: Tensor | None, groups: int) -> Tensor:
    """Dense matrices (K, F, C) of the pair."""
    dense = expand(first, groups)
    shuffled = dense[:, interleave_order(dense.shape[1], groups).to(dense.device)]
    if second is None:
        return shuffled
    return (_by_group(second, groups) @ _by_group(shuffled, groups)).flatten(1, 2) + dense


class _Pair:
    def __init__(self, problem: Problem, groups: int, ridge: float) -> None:
        self.problem = problem
        self.groups = groups
        self.floors = moment_floors(problem, ridge)[:, None, None]
        self.factors = problem.objective_weights
        self.order = interleave_order(problem.rows, groups).to(problem.weights.device)
        self.inverse = self.order.argsort()
        blocks = problem.second.reshape(problem.members, groups, problem.columns // groups, groups, -1)
        self.blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        eye = torch.eye(self.blocks.shape[-1], dtype=self.blocks.dtype, device=self.blocks.device)
        self.blocks = self.blocks + self.floors[..., None] * eye

    def image(self, matrices: Tensor) -> Tensor:
        return matrices @ self.problem.second + self.floors * matrices

    def objective(self, approx: Tensor) -> float:
        gap = self.problem.weights - approx
        return float((self.factors * (self.problem.apply_left(gap) * self.image(gap)).sum(dim=(1, 2))).sum())

    def regress(self, targets: Tensor) -> Tensor:
        """Least squares of every row on the inputs of its own group, (K, F, C / g)."""
        cross = _by_group(extract(self.image(targets), self.groups), self.groups)
        return solve_psd(self.blocks, cross.transpose(2, 3)).transpose(2, 3).flatten(1, 2)

    def fit_second(self, first: Tensor, previous: Tensor) -> Tensor:
        dense = expand(first, self.groups)
        features = dense[:, self.order]
        grouped = _by_group(features, self.groups)
        gram = _by_group(self.image(features), self.groups) @ grouped.transpose(2, 3)
        target = self.image(self.problem.weights - dense)
        cross = _by_group(target, self.groups) @ grouped.transpose(2, 3)
        # Pulling towards the previous weights never raises the objective and settles dependent features.
        pull = 1e-10 if gram.dtype == torch.float64 else 1e-6
        size = gram.diagonal(dim1=2, dim2=3).mean(dim=-1)
        shift = (pull * torch.where(size > 0, size, torch.ones_like(size)))[..., None, None]
        cross = cross + shift * _by_group(previous, self.groups)
        gram = gram + shift * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return solve_psd(gram, cross.transpose(2, 3)).transpose(2, 3).flatten(1, 2)

    def fit_first(self, first: Tensor, second: Tensor, steps: int) -> Tensor:
        grouped = _by_group(second, self.groups)

        def adjoint(image: Tensor) -> Tensor:
            weighted = self.problem.apply_left(image)
            back = (grouped.transpose(2, 3) @ _by_group(weighted, self.groups)).flatten(1, 2)
            return extract(weighted + back[:, self.inverse], self.groups)

        rows = self.problem.rows
        eye = torch.eye(rows, dtype=second.dtype, device=second.device)
        mixing = expand(second, self.groups)[:, :, self.inverse] + eye
        gram = mixing.transpose(1, 2) @ self.problem.apply_left(mixing)
        split = gram.reshape(len(gram), self.groups, rows // self.groups, self.groups, rows // self.groups)
        left_values, left = eigen_psd(split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2))
        right_values, right = eigen_psd(self.blocks)
        scale = left_values.unsqueeze(3) * right_values.unsqueeze(2)

        def precondition(residual: Tensor) -> Tensor:
            inner = left.transpose(2, 3) @ _by_group(residual, self.groups) @ right
            return (left @ (inner / scale) @ right.transpose(2, 3)).flatten(1, 2)

        def apply(value: Tensor) -> Tensor:
            return adjoint(self.image(compose(value, second, self.groups)))

        target = adjoint(self.image(self.problem.weights))
        return conjugate_gradient(LinearSystem(apply, target, precondition, 1), first, steps=steps)


def _solve(
    problem: Problem, groups: int, second: bool, options: PairOptions
) -> tuple[Tensor, Tensor | None, list[float]]:
    work = _Pair(problem, groups, options.ridge)
    if not second:
        first = work.regress(problem.weights[:, work.inverse])
        return first, None, [work.objective(compose(first, None, groups))]
    first = work.regress(problem.weights)
    later = first.new_zeros(problem.members, problem.rows, problem.rows // groups)
    history = [work.objective(compose(first, later, groups))]
    for _ in range(options.rounds):
        before = (first, later)
        later = work.fit_second(first, later)
        first = work.fit_first(first, later, options.cg_steps)
        value = work.objective(compose(first, later, groups))
        if not value <= history[-1]:
            first, later = before
            break
        history.append(value)
        if history[-2] - value <= options.tol * history[-2]:
            break
    return first, later, history


def balanced_orders(
    energy: Tensor, groups: int, free_inputs: bool, free_outputs: bool, rounds: int = 10
) -> tuple[Tensor, Tensor]:
    """Orders of inputs (C,) and outputs (F,) that collect the most ``energy`` (F, C) in g diagonal blocks.

    Alternates balanced assignments of inputs to groups of outputs and back; the kept energy never falls.
    """
    rows, columns = energy.shape
    table = energy.detach().cpu().double()
    of_row = torch.arange(rows) // (rows // groups)
    of_column = torch.arange(columns) // (columns // groups)

    def assign(gain: Tensor) -> Tensor:
        slots = gain.repeat_interleave(gain.shape[0] // groups, dim=1).numpy()
        from scipy.optimize import linear_sum_assignment  # a quarter of a second, for those who get here

        return torch.as_tensor(linear_sum_assignment(slots, maximize=True)[1]) // (gain.shape[0] // groups)

    for _ in range(rounds):
        before = (of_row.clone(), of_column.clone())
        if free_inputs:
            of_column = assign(table.T @ torch.nn.functional.one_hot(of_row, groups).double())
        if free_outputs:
            of_row = assign(table @ torch.nn.functional.one_hot(of_column, groups).double())
        if torch.equal(before[0], of_row) and torch.equal(before[1], of_column):
            break
    return of_column.argsort(stable=True), of_row.argsort(stable=True)


def solve(
    problem: Problem,
    groups: int,
    *,
    second: bool | None = None,
    free_inputs: bool = False,
    free_outputs: bool = False,
    options: PairOptions | None = None,
    **settings: Any,
) -> GroupedSolution:
    """Fit the grouped pair to dense 1x1 layers.

    Args:
        problem: K dense matrices (K, F, C).
        groups: g, a divisor of F and of C.
        second: whether the second grouped convolution and the sum are there; None follows C >= F.
        free_inputs, free_outputs: the caller can reorder those channels, so an order that keeps more of the layer's
            energy inside the groups may be chosen; the orders come back in the solution.
        options, settings: a record, or its fields by keyword.

    Raises:
        SharefoldError: not a 1x1 layer, or g does not divide the channels.
    """
    options = chosen(options, settings, PairOptions)
    if problem.taps != 1:
        raise SharefoldError(f"grouped: kernel {problem.kernel}: only 1x1 layers have a grouped pointwise form")
    if groups < 1 or problem.rows % groups or problem.columns % groups:
        raise SharefoldError(
            f"grouped: {groups} groups do not divide {problem.columns} inputs and {problem.rows} outputs"
        )
    if second is None:
        second = problem.columns >= problem.rows
    dtype, device = problem.weights.dtype, problem.weights.device
    problem = problem.working()
    first, later, history = _solve(problem, groups, second, options)
    errors = problem.errors(compose(first, later, groups))
    inputs = torch.arange(problem.columns, device=device).expand(problem.members, -1).clone()
    outputs = torch.arange(problem.rows, device=device).expand(problem.members, -1).clone()
    if free_inputs or free_outputs:
        spread = interleave_order(problem.rows, groups).argsort() if not second else torch.arange(problem.rows)
        energy = problem.apply_left(problem.weights.square()) * problem.second.diagonal(dim1=1, dim2=2).unsqueeze(1)
        energy = energy[:, spread.to(device)]
        for k in range(problem.members):
            order, rows = balanced_orders(energy[k], groups, free_inputs, free_outputs)
            # Without the second factor the groups of outputs are those before the interleave.
            rows = spread[rows][spread.argsort()]
            order, rows = order.to(device), rows.to(device)
            one = Problem(
                problem.weights[k][rows][:, order].unsqueeze(0),
                problem.second[k][order][:, order].unsqueeze(0),
                problem.row_metric[k][rows].unsqueeze(0),
                layer_weights=problem.objective_weights[k : k + 1],
            )
            trial, trial_later, _ = _solve(one, groups, second, options)
            error = one.errors(compose(trial, trial_later, groups))[0]
            if error < errors[k]:
                first[k], errors[k], inputs[k], outputs[k] = trial[0], error, order, rows
                if later is not None and trial_later is not None:
                    later[k] = trial_later[0]
    return GroupedSolution(
        first.to(dtype),
        None if later is None else later.to(dtype),
        groups,
        errors.to(dtype),
        history,
        inputs if free_inputs else None,
        outputs if free_outputs else None,
    )
