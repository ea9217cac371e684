"""Which channels to leave out when the layers that read them are solved again without them.

A reader with weight W (O x N) and input moment S sees a channel through a block of b = h * w of its N columns. Without the
columns R, and with the best weights on the kept columns A, its output error is ::

    min_C ||D (W - C E_A) S^(1/2)||^2  =  tr(D W_R (S_RR - S_RA S_AA^-1 S_AR) W_R^T D),   C = W_A + W_R S_RA S_AA^-1

so that what makes up for R is a matrix of the inputs alone: every row of W uses the same one. Backward elimination leaves out
one channel j after the other, the cheapest first. With P = S^-1 of the columns that are left and C the present weights it costs
exactly tr(D C_j P_jj^-1 C_j^T D), and leaves C - C_j P_jj^-1 P_j and P - P_:j P_jj^-1 P_j (optimal brain surgeon, Hassibi and
Stork 1993, https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html, by blocks).
Several readers of the same channels are eliminated together; their weighted errors add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.running import one_thread
from sharefold.solvers.align import column_index

# Share of the columns that is eliminated between two updates of the whole matrices, and the fewest: until then they are kept as
# factors.
PANEL_SHARE, PANEL = 1 / 16, 64
# Up to so many columns a step is so small that several threads spend their time in waiting for each other.
ALONE = 1536


@dataclass(frozen=True)
class Reader:
    """A layer that reads n channels through N = n * b columns, those of a channel side by side.

    Attributes:
        weight: (O, N).
        moment: (N, N), positive definite.
        rows: (O,) weights of the squared errors of its outputs (the squares of D).
    """

    weight: Tensor
    moment: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Elimination:
    """The order in which channels go, and what that costs.

    Attributes:
        order: (m,) channels, the first to go first.
        errors: (K, m + 1) float64: squared error of every reader after so many of them are gone, in units of ``rows``.
        channels: how many there were.
    """

    order: Tensor
    errors: Tensor
    channels: int

    def kept(self, count: int) -> Tensor:
        """The ``count`` channels that stay, sorted."""
        return left_out(self.order[: self.channels - count], self.channels)


def eliminate(
    readers: Sequence[Reader], channels: int, fewest: int = 1, shares: Sequence[float] | None = None
) -> Elimination:
    """Leaves out channels one by one until ``fewest`` are left; O(O N^2 + N^3) operations for each reader.

    Args:
        shares: how much every reader's error counts; by default all the same.

    Raises:
        SharefoldError: a reader's columns are no multiple of ``channels``, or its moment is not positive definite.
    """
    if not readers or not 1 <= fewest <= channels:
        raise SharefoldError(f"channel elimination: {len(readers)} readers, {fewest} of {channels} channels to keep")
    small = max(reader.weight.shape[1] for reader in readers) <= ALONE
    with one_thread() if small else nullcontext():
        return _eliminated(readers, channels, fewest, shares)


def _eliminated(readers: Sequence[Reader], channels: int, fewest: int, shares: Sequence[float] | None) -> Elimination:
    states = [_State(reader, channels) for reader in readers]
    factors = torch.ones(len(readers)) if shares is None else torch.tensor(list(shares))
    alive = torch.arange(channels)
    pending: list[int] = []  # places in `alive` that are gone
    order: list[int] = []
    steps: list[list[float]] = []
    while channels - len(order) > fewest:
        costs = torch.stack([state.costs() for state in states])
        total = factors.to(costs) @ costs
        total[pending] = torch.inf
        place = int(total.argmin())
        order.append(int(alive[place]))
        steps.append(costs[:, place].tolist())
        pending.append(place)
        for state in states:
            state.leave_out(place)
        width = max(state.block for state in states)
        if len(pending) * width >= max(PANEL, PANEL_SHARE * len(alive) * width):
            left = left_out(torch.tensor(pending), len(alive))
            for state in states:
                state.compact(left)
            alive, pending = alive[left], []
    errors = torch.zeros(len(readers), len(order) + 1, dtype=torch.float64)
    if steps:
        errors[:, 1:] = torch.tensor(steps, dtype=torch.float64).clamp_min(0).T.cumsum(1)
    return Elimination(torch.tensor(order, dtype=torch.long), errors, channels)


class _State:
    """One reader's inverse moment P and weights C on what is left: P - U U^T and C - V U^T with the pending factors."""

    def __init__(self, reader: Reader, channels: int) -> None:
        features = reader.weight.shape[1]
        if features % channels or reader.moment.shape != (features, features):
            raise SharefoldError(
                f"channel elimination: {features} columns and a moment {tuple(reader.moment.shape)} for {channels} channels"
            )
        self.block = features // channels
        moment = reader.moment.double()
        factor, failed = torch.linalg.cholesky_ex(moment)
        if bool(failed):
            raise SharefoldError("channel elimination: the input moment is not positive definite")
        self.inverse = torch.cholesky_inverse(factor)
        self.weight = reader.weight.double() * reader.rows.double().clamp_min(0).sqrt()[:, None]
        self._refresh()

    def _refresh(self) -> None:
        n, b = self.inverse.shape[0] // self.block, self.block
        self.diagonal = self.inverse.reshape(n, b, n, b).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (n, b, b)
        columns = self.weight.reshape(-1, n, b).permute(1, 2, 0)  # (n, b, O)
        self.energy = columns @ columns.transpose(1, 2)  # (n, b, b)
        self.inverse_factor = self.inverse.new_zeros(len(self.inverse), 0)  # U
        self.weight_factor = self.weight.new_zeros(len(self.weight), 0)  # V

    def costs(self) -> Tensor:
        """(n,) what leaving out each channel would add to the error; meaningless where one is gone."""
        if self.block == 1:
            return (self.energy / self.diagonal.clamp_min(1e-300)).flatten()
        factor, failed = torch.linalg.cholesky_ex(self.diagonal)
        solved = torch.cholesky_solve(self.energy, factor).diagonal(dim1=1, dim2=2).sum(1)
        return torch.where((failed == 0) & torch.isfinite(solved), solved, torch.inf)

    def leave_out(self, place: int) -> None:
        """Takes a channel out of P and C."""
        b = self.block
        own = slice(place * b, place * b + b)
        column = self.inverse[:, own] - self.inverse_factor @ self.inverse_factor[own].T  # (N, b)
        values = self.weight[:, own] - self.weight_factor @ self.inverse_factor[own].T  # (O, b)
        factor = _factor(column[own])
        u = torch.linalg.solve_triangular(factor, column.T, upper=False).T  # (N, b)
        v = torch.linalg.solve_triangular(factor, values.T, upper=False).T  # (O, b)
        along = self.weight.T @ v - self.inverse_factor @ (self.weight_factor.T @ v)  # C^T v, (N, b)
        blocks, across = u.reshape(-1, b, b), along.reshape(-1, b, b)
        mixed = across @ blocks.transpose(1, 2)
        self.energy += blocks @ (v.T @ v) @ blocks.transpose(1, 2) - mixed - mixed.transpose(1, 2)
        self.diagonal -= blocks @ blocks.transpose(1, 2)
        self.diagonal[place] = torch.eye(b, dtype=u.dtype, device=u.device)  # gone: anything that can be factored
        self.inverse_factor = torch.cat([self.inverse_factor, u], 1)
        self.weight_factor = torch.cat([self.weight_factor, v], 1)

    def compact(self, left: Tensor) -> None:
        """Multiplies the pending factors out, on the channels in ``left`` alone."""
        index = column_index(left, self.block).to(self.inverse.device)
        u = self.inverse_factor[index]
        self.inverse = torch.addmm(self.inverse[index][:, index], u, u.T, alpha=-1)
        self.weight = torch.addmm(self.weight[:, index], self.weight_factor, u.T, alpha=-1)
        self._refresh()


def _factor(matrix: Tensor) -> Tensor:
    """Cholesky factor (n, n) of ``matrix``, which is positive definite but for rounding; of the nearest such one else.

    Few images leave directions without any input: their inverse is large, and what is subtracted from it leaves rounding.
    """
    matrix = (matrix + matrix.T) / 2
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(matrix)
    least = (values.abs().max() * 1e-9).clamp_min(1e-300)
    return torch.linalg.cholesky(vectors * values.clamp_min(least) @ vectors.T)


def columns(kept: Tensor, channels: int, features: int) -> tuple[Tensor, Tensor]:
    """Of ``features`` columns those of the channels that stay, and the others."""
    block = features // channels
    return column_index(kept, block), column_index(left_out(kept, channels), block)


def compensation(moment: Tensor, kept: Tensor, channels: int) -> Tensor:
    """(R, A): the matrix S_RA S_AA^-1 by which the kept columns, multiplied from the left by W_R, make up for the others.

    Args:
        moment: (N, N), positive definite; N = channels * b.
        kept: sorted indices of the channels that stay.
    """
    mine, others = columns(kept, channels, len(moment))
    moment = moment.double()
    factor = _factor(moment[mine][:, mine])
    return torch.cholesky_solve(moment[mine][:, others], factor).T


def left_out(kept: Tensor, channels: int) -> Tensor:
    """The channels that are not among ``kept``, sorted."""
    stays = torch.zeros(channels, dtype=torch.bool)
    stays[kept.cpu()] = True
    return (~stays).nonzero().flatten()


def error_without(reader: Reader, kept: Tensor, channels: int, mix: Tensor) -> float:
    """Squared error of the reader, in units of ``rows``, when only ``kept`` stay and make up for the others by ``mix``.

    Args:
        mix: from :func:`compensation`.
    """
    mine, others = columns(kept, channels, len(reader.moment))
    moment = reader.moment.double()
    rest = moment[others][:, others] - mix @ moment[mine][:, others]
    weight = reader.weight.double()[:, others] * reader.rows.double().sqrt()[:, None]
    return float(((weight @ rest) * weight).sum())
