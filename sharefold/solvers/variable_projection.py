"""Shared and own filters together, with the coefficients solved away: ``W_k ~ C_k T_k``, ``T_k = [own_k; B]``.

For given filters the best coefficients are a least-squares problem, so that the error is a function of the filters alone:
``err_k = |D_k W_k S_k^(1/2)|^2 - |L_k^-1 T_k S_k W_k^T D_k|^2`` with ``L_k`` the Cholesky factor of ``T_k S_k T_k^T`` (variable
projection: Golub and Pereyra, SIAM J. Numer. Anal. 10, 1973). Its slope needs no derivative of the coefficients, because
they are optimal: ``-2 C_k^T D_k^2 (W_k - C_k T_k) S_k``, of whose entries those count that a filter's numbers stand in. One
solver serves every form whose filters are linear in its numbers: a basis shared by all layers (``B``), own filters of any
kind (``rows``) or own vertical filters in every column of the kernel (``columns``), alone or together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers import low_rank
from sharefold.solvers.data_norm import RIDGE, Problem, eigen_psd, moment_floors
from sharefold.solvers.directions import leading, orthonormal

# Directions that matter less than this, against the most important one, are not stretched further.
SCALE_FLOOR = 1e-5

# Of the power method for the largest moment that is left.
POWER_STEPS = 8

Kind = Literal["columns", "rows"]


class VariableProjection:
    """The error of a group as a function of its filters; what does not depend on them is computed once.

    Args:
        problem: E entries (layers, or conv groups of layers).
        kind: of the own filters.
        groups: entries a layer: they are one after another, and share the layer's own filters.
        inputs: per layer, how many of the own filters' columns J it has, where layers differ in width; by default all.
        ridge: floor of the moments, relative to their mean diagonal.
    """

    def __init__(
        self, problem: Problem, kind: Kind = "columns", *, groups: int = 1, inputs: Sequence[int] | None = None,
        ridge: float = RIDGE,
    ) -> None:  # fmt: skip
        self.dtype = problem.weights.dtype
        self.problem = problem = problem.working()
        self.kind, self.groups = kind, groups
        self.layers = problem.members // groups
        self.wide = problem.kernel[1] if kind == "columns" else 1
        self.columns = problem.columns // self.wide
        floors = moment_floors(problem, ridge)
        self.moments = problem.second.clone()
        self.moments.diagonal(dim1=1, dim2=2).add_(floors[:, None])
        self.root = low_rank.output_roots(problem)[0]
        scaled = self._scaled(problem.weights)
        self.targets = (scaled @ self.moments).transpose(1, 2).contiguous()  # S W^T D, (E, N, O)
        self.factors = problem.objective_weights
        self.energy = (scaled * self.targets.transpose(1, 2)).sum(dim=(1, 2))
        self.total = float((self.factors * self.energy).sum())
        self.mask: Tensor | None = None
        if inputs is not None and min(inputs) < self.columns:
            place, limits = torch.arange(self.columns), torch.tensor(list(inputs))
            self.mask = (place[None] < limits[:, None]).to(problem.weights)[:, None]
        self._mean: tuple[Tensor, Tensor] | None = None
        self._own: tuple[Tensor, Tensor] | None = None
        self._first_own: Tensor | None = None

    # Filters -----------------------------------------------------------------------------------------------------

    def spread(self, own: Tensor) -> Tensor:
        """Own filters (L, r, J) as rows of the layers' matrices (E, r * w, N)."""
        if self.wide > 1:
            layers, count, inputs = own.shape
            placed = own.new_zeros(layers, count, self.wide, inputs, self.wide)
            placed.diagonal(dim1=2, dim2=4).copy_(own.unsqueeze(3).expand(-1, -1, -1, self.wide))
            own = placed.view(layers, count * self.wide, inputs * self.wide)
        return own if self.groups == 1 else own.repeat_interleave(self.groups, 0)

    def stack(self, basis: Tensor, own: Tensor) -> Tensor:
        """``T`` (E, M, N)."""
        entries = self.problem.members
        return torch.cat([self.spread(own), basis.expand(entries, *basis.shape)], 1)

    def _image(self, basis: Tensor, own: Tensor) -> Tensor:
        """``T S`` (E, M, N); vertical filters meet only the moments of their own column."""
        entries, size, count = self.problem.members, self.problem.columns, own.shape[1]
        result = basis.new_empty(entries, count * self.wide + len(basis), size)
        if count:
            each = own if self.groups == 1 else own.repeat_interleave(self.groups, 0)
            cells = self.moments.view(entries, self.columns, self.wide, size)
            parts = result[:, : count * self.wide].view(entries, count, self.wide, size)
            for b in range(self.wide):
                parts[:, :, b] = each @ cells[:, :, b]
        if len(basis):
            result[:, count * self.wide :] = basis @ self.moments
        return result

    # The function ------------------------------------------------------------------------------------------------

    def _factor(self, filters: Tensor, image: Tensor) -> Tensor | None:
        """The Cholesky factor of ``T S T^T`` (E, M, M); None where filters are not finite."""
        gram = image @ filters.transpose(1, 2)
        tiny = 1e-13 if gram.dtype == torch.float64 else 1e-7
        shift = tiny * gram.diagonal(dim1=1, dim2=2).mean(1)
        for _ in range(8):
            shifted = gram.clone()
            shifted.diagonal(dim1=1, dim2=2).add_(shift[:, None])
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if not bool(failed.any()):
                return factor
            shift = shift * torch.where(failed > 0, 10.0, 1.0)
        return None

    def _solved(self, filters: Tensor, image: Tensor) -> tuple[Tensor, Tensor] | None:
        """``T S W^T D`` and the best ``C^T D``, both (E, M, O); None where filters are not finite."""
        factor = self._factor(filters, image)
        if factor is None:
            return None
        cross = filters @ self.targets
        return cross, torch.cholesky_solve(cross, factor)

    def evaluate(self, basis: Tensor, own: Tensor) -> tuple[float, Tensor, Tensor]:
        """The weighted error of (R, N) and (L, r, J), and its slopes in both; infinite where filters are not finite."""
        filters, image = self.stack(basis, own), self._image(basis, own)
        found = self._solved(filters, image)
        if found is None:
            return float("inf"), torch.zeros_like(basis), torch.zeros_like(own)
        cross, mixed = found
        value = self.total - float((self.factors * (mixed * cross).sum(dim=(1, 2))).sum())
        weighted = mixed * (-2 * self.factors)[:, None, None]
        slope = weighted @ self.targets.transpose(1, 2) - (weighted @ mixed.transpose(1, 2)) @ image
        count = own.shape[1] * self.wide
        return value, slope[:, count:].sum(0), self._own_slope(slope[:, :count], own.shape[1])

    def _own_slope(self, slope: Tensor, count: int) -> Tensor:
        """(L, r, J) of the slopes (E, r * w, N) of all rows."""
        if self.wide > 1:
            cells = slope.reshape(len(slope), count, self.wide, self.columns, self.wide)
            slope = cells.diagonal(dim1=2, dim2=4).sum(-1)
        if self.groups > 1:
            slope = slope.reshape(self.layers, self.groups, *slope.shape[1:]).sum(1)
        return slope if self.mask is None else slope * self.mask

    def coefficients(self, basis: Tensor, own: Tensor) -> Tensor:
        """The best ``C`` (E, O, M)."""
        found = self._solved(self.stack(basis, own), self._image(basis, own))
        if found is None:
            raise SharefoldError("the filters of a group are not finite: check its weights and the calibration images")
        mixed = found[1].transpose(1, 2)
        return mixed / self.root

    def errors(self, basis: Tensor, own: Tensor) -> Tensor:
        """Relative errors (E,) with the best coefficients, without the ridge's help."""
        return self.problem.errors(self.coefficients(basis, own) @ self.stack(basis, own))

    # Scales ------------------------------------------------------------------------------------------------------

    def largest_left(self, filters: Tensor, image: Tensor) -> Tensor:
        """(E,) about the largest eigenvalue of ``S - S T^T (T S T^T)^-1 T S``, the moments of what ``T`` does not span; a small
        share of the largest of ``S`` where it spans all."""
        factor = self._factor(filters, image)
        assert factor is not None
        start = torch.randn(self.problem.columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vector = start.to(self.moments).expand(len(self.moments), -1).unsqueeze(2)
        for _ in range(POWER_STEPS):
            vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vector.dtype).tiny)
            spanned = image.transpose(1, 2) @ torch.cholesky_solve(image @ vector, factor)
            vector = self.moments @ vector - spanned
        floor = SCALE_FLOOR * self.moments.diagonal(dim1=1, dim2=2).mean(1)
        return torch.maximum(vector.norm(dim=1).squeeze(1), floor.clamp_min(torch.finfo(floor.dtype).tiny))

    @property
    def mean_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and vectors of the mean moment, weighted as the objective weighs the layers."""
        if self._mean is None:
            scale = self.factors * self.energy
            self._mean = eigen_psd(torch.tensordot(scale / scale.sum().clamp_min(1e-30), self.moments, dims=1))
        return self._mean

    @property
    def own_eigen(self) -> tuple[Tensor, Tensor]:
        """The same of what the own filters see, (L, J) and (L, J, J); of whole filters the mean moment's for all layers."""
        if self._own is None and self.kind == "rows":
            values, vectors = self.mean_eigen
            self._own = values.expand(self.layers, -1), vectors.expand(self.layers, -1, -1)
        elif self._own is None:
            cells = self.moments.view(len(self.moments), self.columns, self.wide, self.columns, self.wide)
            moments = cells.diagonal(dim1=2, dim2=4).mean(-1)
            self._own = eigen_psd(moments.reshape(self.layers, self.groups, *moments.shape[1:]).mean(1))
        return self._own

    # Starts ------------------------------------------------------------------------------------------------------

    def start(self, rank: int, own: int) -> tuple[Tensor, Tensor]:
        """Own filters first, of every layer's weights; then the leading shared ones of what they leave."""
        none = self.problem.weights.new_zeros(0, self.problem.columns)
        private = self.start_own(own, none)
        return self._start_shared(rank, private), private

    def start_own(self, count: int, basis: Tensor) -> Tensor:
        """The leading own filters (L, count, J) of what the shared ones (R, N) leave."""
        if not count:
            return self.problem.weights.new_zeros(self.layers, 0, self.columns)
        if len(basis):
            found = self._leading_own(basis, count)
        else:  # of the whole weights: those of a smaller number are the first of a larger one
            if self._first_own is None:
                self._first_own = self._leading_own(basis, self.columns)
            found = self._first_own[:, :count]
        return found if self.mask is None else orthonormal(found * self.mask)

    def _leading_own(self, basis: Tensor, count: int) -> Tensor:
        none = self.problem.weights.new_zeros(self.layers, 0, self.columns)
        # Every row of every column of the kernel is a row of the unfolded weights.
        rows = self._scaled(self._rest(basis, none)).reshape(self.layers, self.groups, -1, self.columns, self.wide)
        return leading(torch.einsum("lgojb,lgomb->ljm", rows, rows), *self.own_eigen, count)

    def _start_shared(self, rank: int, own: Tensor) -> Tensor:
        none = self.problem.weights.new_zeros(0, self.problem.columns)
        if not rank:
            return none
        rows = self._scaled(self._rest(none, own)) * self.factors.sqrt()[:, None, None]
        return leading(torch.einsum("eon,eom->nm", rows, rows), *self.mean_eigen, rank)

    def _rest(self, basis: Tensor, own: Tensor) -> Tensor:
        """What the filters leave of the weights (E, O, N)."""
        weights = self.problem.weights
        filters = self.stack(basis, own)
        return weights - self.coefficients(basis, own) @ filters if filters.shape[1] else weights

    def _scaled(self, matrices: Tensor) -> Tensor:
        """``D`` times (E, O, N)."""
        return self.root * matrices
