"""Alignment before tying: put the private inner channels of every block in a common order.

A block whose inner channels are written by one layer and read by another computes the same function under any
permutation of them. Choosing it so that the blocks' matrices agree makes tying cheaper; coordinate descent over
blocks with the Hungarian method follows Git Re-Basin (arXiv 2209.04836), here under the data norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.data_norm import Problem


@dataclass
class Side:
    """Matrices of K blocks that the same inner channels run through.

    Attributes:
        problem: the K matrices to be tied, one per block.
        axis: "rows" where the inner channels are the outputs (first convolution), "columns" where they are the
            inputs (second convolution; ``problem.kernel`` says how many columns one channel has).
    """

    problem: Problem
    axis: str


@dataclass
class Alignment:
    """Permutations (K, C) int64: new channel ``c`` of block ``k`` is its old channel ``permutations[k, c]``.

    ``history`` is the tied error (sum over sides and blocks, matrices tied to their weighted mean) at the start and
    after every accepted move; non-increasing.
    """

    permutations: Tensor
    history: list[float] = field(default_factory=list)


def column_index(permutation: Tensor, taps: int) -> Tensor:
    """Column order (C * taps,) that a channel permutation (C,) means for an im2col matrix."""
    return (permutation.unsqueeze(1) * taps + torch.arange(taps, device=permutation.device)).flatten()


def apply(side: Side, permutations: Tensor) -> Problem:
    """The side's problem with every block's channels reordered."""
    problem = side.problem
    if side.axis == "rows":
        rows = permutations
        weights = torch.stack([w[p] for w, p in zip(problem.weights, rows, strict=True)])
        row_weights = torch.stack([r[p] for r, p in zip(problem.row_metric, rows, strict=True)])
        return Problem(weights, problem.second, row_weights, problem.kernel, problem.layer_weights)
    order = [column_index(p, problem.taps) for p in permutations]
    weights = torch.stack([w[:, i] for w, i in zip(problem.weights, order, strict=True)])
    moments = torch.stack([s[i][:, i] for s, i in zip(problem.second, order, strict=True)])
    return Problem(weights, moments, problem.row_metric, problem.kernel, problem.layer_weights)


class _State:
    """One side under the current permutations, with what proposals and objectives need."""

    def __init__(self, side: Side) -> None:
        self.axis = side.axis
        self.problem = side.problem.working()
        self.factors = self.problem.objective_weights
        self.taps = self.problem.taps
        members = self.problem.members
        self.channels = self.problem.rows if side.axis == "rows" else self.problem.columns // self.taps
        self.metric = self.factors[:, None] * self.problem.row_metric
        if side.axis == "columns":
            blocks = self.problem.second.reshape(members, self.channels, self.taps, self.channels, self.taps)
            self.blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def permuted(self, k: int, permutation: Tensor) -> Tensor:
        """Weights (O, N) of block ``k`` in the common order."""
        weights = self.problem.weights[k]
        return weights[permutation] if self.axis == "rows" else weights[:, column_index(permutation, self.taps)]

    def mass(self, k: int, permutation: Tensor) -> Tensor:
        """Row weights (O,) of block ``k`` in the common order."""
        return self.metric[k][permutation] if self.axis == "rows" else self.metric[k]

    def mean(self, permutations: Tensor, skip: int | None = None) -> Tensor:
        """Weighted mean (O, N) of the blocks in the common order."""
        total = torch.zeros_like(self.problem.weights[0])
        weight = total.new_zeros(total.shape[0])
        for k, permutation in enumerate(permutations):
            if k != skip:
                mass = self.mass(k, permutation)
                total += mass[:, None] * self.permuted(k, permutation)
                weight += mass
        return total / torch.where(weight > 0, weight, torch.ones_like(weight)).unsqueeze(1)

    def objective(self, permutations: Tensor) -> float:
        mean = self.mean(permutations)
        total = 0.0
        for k, permutation in enumerate(permutations):
            gap = self._gap(k, permutation, mean)
            total += float((self.metric[k] * ((gap @ self.problem.second[k]) * gap).sum(dim=1)).sum())
        return total

    def _gap(self, k: int, permutation: Tensor, target: Tensor) -> Tensor:
        """Block ``k`` minus the target, in the block's own order, so that its moments apply as they are."""
        inverse = permutation.argsort()
        if self.axis == "rows":
            return self.problem.weights[k] - target[inverse]
        return self.problem.weights[k] - target[:, column_index(inverse, self.taps)]

    def assignment_cost(self, k: int, target: Tensor) -> Tensor:
        """Cost (C, C) of giving slot i of the target the old channel j of block ``k``.

        Exact for rows. For columns the moments couple channels, so only each channel's own block is counted; the
        caller checks the true objective before accepting a move.
        """
        weights, moments, metric = self.problem.weights[k], self.problem.second[k], self.metric[k]
        if self.axis == "rows":
            image = target @ moments
            cross = image @ weights.T
            norms = (image * target).sum(dim=1)
            return metric[None, :] * (norms[:, None] - 2 * cross)
        rows = weights.shape[0]
        blocks = self.blocks[k]
        goal = target.reshape(rows, self.channels, self.taps)
        own = weights.reshape(rows, self.channels, self.taps)
        image = torch.einsum("ojt,jts->ojs", metric[:, None, None] * own, blocks)
        cross = torch.einsum("ois,ojs->ij", goal, image)
        gram = torch.einsum("oit,o,ois->its", goal, metric, goal)
        return torch.einsum("its,jts->ij", gram, blocks) - 2 * cross


def solve(
    sides: Sequence[Side], rounds: int = 10, tol: float = 1e-6, generator: torch.Generator | None = None
) -> Alignment:
    """Permutations of the inner channels of K blocks that lower the error of tying them.

    Every move aligns one block to the mean of the others and is kept only if the tied error falls.

    Args:
        sides: all matrices the inner channels run through; K and the channel count must agree.
        rounds: most sweeps over the blocks.
        tol: stop after a sweep that gains less than this fraction.
        generator: order of the blocks in a sweep; None keeps it 0 .. K-1.

    Raises:
        SharefoldError: no side, an unknown axis, or sides that disagree on K or the channel count.
    """
    if not sides:
        raise SharefoldError("align: no matrices given: pass at least one side")
    for side in sides:
        if side.axis not in ("rows", "columns"):
            raise SharefoldError(f"align: axis {side.axis!r}: expected 'rows' or 'columns'")
    states = [_State(side) for side in sides]
    shapes = {(s.problem.members, s.channels) for s in states}
    if len(shapes) > 1:
        raise SharefoldError(f"align: sides disagree on blocks and channels: {sorted(shapes)}")
    members, channels = shapes.pop()
    device = states[0].problem.weights.device
    identity = torch.arange(channels, device=device).expand(members, channels)

    def objective(permutations: Tensor) -> float:
        return sum(state.objective(permutations) for state in states)

    def propose(k: int, targets: Sequence[Tensor]) -> Tensor:
        cost = sum(state.assignment_cost(k, target) for state, target in zip(states, targets, strict=True))
        assert isinstance(cost, Tensor)
        from scipy.optimize import linear_sum_assignment  # a quarter of a second, for those who get here

        return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=device)

    current = identity.clone()
    history = [objective(current)]
    if members < 2:
        return Alignment(current, history)
    # Start: everybody aligned to the block with the largest say, if that is better than the order they came in.
    say = sum(state.metric.sum(dim=1) for state in states)
    assert isinstance(say, Tensor)
    reference = int(say.argmax())
    targets = [state.permuted(reference, current[reference]) for state in states]
    start = torch.stack([current[k] if k == reference else propose(k, targets) for k in range(members)])
    value = objective(start)
    if value < history[-1]:
        current = start
        history.append(value)
    for _ in range(rounds):
        before = history[-1]
        order = range(members) if generator is None else torch.randperm(members, generator=generator).tolist()
        for k in order:
            trial = current.clone()
            trial[k] = propose(k, [state.mean(current, skip=k) for state in states])
            if torch.equal(trial[k], current[k]):
                continue
            value = objective(trial)
            if value < history[-1]:
                current = trial
                history.append(value)
        if before - history[-1] <= tol * before:
            break
    return Alignment(current, history)
