"""Shared filters and a layer's own: one bank of filters a group, and for every layer column filters beside it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sharefold.calibration.problem import GroupProblem
from sharefold.calibration.ragged import RaggedProblem
from sharefold.layers import Bank, BasisConv, ConvForm, HybridConv, SharedConv
from sharefold.methods.contract import LARGE_FEATURES, Candidate, Solution
from sharefold.methods.two_factors import TwoFactors, blank_pivots, per_layer
from sharefold.solvers import shared_and_own
from sharefold.solvers.interpolative import pivot
from sharefold.solvers.variable_projection import Kind, VariableProjection

# Of a candidate's parameters, what the layers' own filters and their coefficients take.
SHARES = (0.4, 0.65)
# Candidates per share, of which so many are fitted; the errors of those between are interpolated.
POINTS = 32
FITTED = 4
# Smaller ones, of the dense weights, leave hardly anything of the outputs.
SMALLEST = 0.04
# Filters of so few numbers allow few counts, with jumps between; there more candidates are fitted.
SMALL_FEATURES, MORE_FITTED = 100, 8


class Hybrid(TwoFactors):
    """What_k = C_k [own_k; B] by variable projection under the data norm. Options: ``rank`` of B, ``own`` filters, ``pivoted``.

    Own filters are h x 1 ones, in every column of the kernel, or whole ones where the kernel has one row or column. Members may
    differ in width, as for :class:`sharefold.methods.basis.Basis`.
    """

    name = "hybrid"
    paper = "https://arxiv.org/abs/2006.05066"
    option_names = frozenset({"rank", "own", "pivoted"})
    takes_ragged = True

    def candidates(self, problem: GroupProblem | RaggedProblem) -> list[Candidate]:
        forms, flat = problem.forms, problem.flat().for_estimates()
        dense = sum(form.out_channels * form.features for form in forms)
        sizes = [self._sizes(forms, dense, share) for share in SHARES]
        if not any(sizes):
            return []
        large = flat.columns > LARGE_FEATURES
        work = VariableProjection(flat, kind_of(forms[0]), groups=forms[0].groups, inputs=own_inputs(forms))
        iterations = 5 if large else 10
        found: dict[tuple[int, int], Candidate] = {}
        for row in sizes[1:] if large else sizes:
            costs = np.array([self.amount(forms, *size) for size in row])
            count = MORE_FITTED if flat.columns <= SMALL_FEATURES else FITTED
            # The errors' logarithms are nearly straight lines over the cost, so that the fitted ones are spaced evenly.
            even = np.linspace(costs[0], costs[-1], count) if row else costs
            fitted = [row[i] for i in sorted({int(np.abs(costs - cost).argmin()) for cost in even})]
            known = [self.amount(forms, *size) for size in fitted]
            efforts = [max(8, round(2 * iterations * cost / dense)) for cost in known]  # small ones are soon as good as they get
            errors = [per_layer(len(forms), flat, e) for e in shared_and_own.curve(work, fitted, efforts)]
            for size in row:
                cost = self.amount(forms, *size)
                found[size] = Candidate(self.sized(*size), cost, _between(cost, known, errors))
        return sorted(found.values(), key=lambda candidate: candidate.cost)

    def _sizes(self, forms: Sequence[ConvForm], dense: int, share: float) -> list[tuple[int, int]]:
        """(rank, own) of growing cost, below ``dense``, with about ``share`` of the cost for the own part."""
        room, wide = max(form.features for form in forms), _width(forms[0])
        if min(room, *own_inputs(forms)) < 2:
            return []
        costs = np.geomspace(max(self.amount(forms, 1, 1), SMALLEST * dense), 0.95 * dense, POINTS)
        sizes = {self.split(forms, cost, share) for cost in costs.tolist()}
        sizes = {size for size in sizes if size[0] + size[1] * wide <= room and self.amount(forms, *size) < dense}
        return sorted(sizes, key=lambda size: self.amount(forms, *size))

    def split(self, forms: Sequence[ConvForm], cost: float, share: float) -> tuple[int, int]:
        """The largest (rank, own), at least (1, 1), of at most ``cost``, about ``share`` of it for the own part."""
        limits = self.largest(list(forms))
        if self.pivoted:  # something must be left to follow from the pivots
            columns, narrow = max(form.features for form in forms), min(own_inputs(forms))
            limits = {"rank": min(limits["rank"], columns - 1), "own": min(limits["own"], narrow - 1)}
        own = _most(limits["own"], share * cost, partial(self.amount, forms, 0))
        return _most(limits["rank"], cost, partial(self._with_own, forms, own)), own

    def _with_own(self, forms: Sequence[ConvForm], own: int, rank: int) -> int:
        return self.amount(forms, rank, own)

    def amount(self, forms: Sequence[ConvForm], rank: int, own: int) -> int:
        """Numbers in all tensors, with one for the place of every pivot."""
        rows = sum(form.out_channels for form in forms)
        total = rows * (rank + own * _width(forms[0]))
        for count, columns in [(rank, max(form.features for form in forms)), *((own, size) for size in own_inputs(forms))]:
            total += count * (columns - count + 1 if self.pivoted else columns)
        return total

    def cost(self, forms: list[ConvForm], options: dict[str, Any]) -> int:
        rank, own, pivoted = int(options["rank"]), int(options["own"]), bool(options.get("pivoted"))
        widest = max(form.features for form in forms)
        total = sum(form.out_channels for form in forms) * (rank + own * _width(forms[0]))
        total += rank * (widest - rank if pivoted and rank < widest else widest)
        return total + sum(own * (columns - own if pivoted else columns) for columns in own_inputs(forms))

    def sized(self, rank: int, own: int) -> dict[str, Any]:
        options = self.options(rank)
        return {"rank": options.pop("rank"), "own": own, **options}

    def solve(self, problem: GroupProblem | RaggedProblem, options: dict[str, Any]) -> Solution:
        forms, flat = problem.forms, problem.flat()
        widest = max(forms, key=lambda form: form.features)
        effort: dict[str, Any] = {} if widest.features <= LARGE_FEATURES else {"iterations": 15}
        how: dict[str, Any] = {"kind": kind_of(forms[0]), "groups": forms[0].groups, "inputs": own_inputs(forms)}
        result = shared_and_own.solve(flat, int(options["rank"]), int(options["own"]), **how, **effort)
        coefficients = result.coefficients.reshape(len(forms), -1, result.coefficients.shape[-1])
        bank = {"basis": result.basis.reshape(-1, *widest.weight_shape[1:]).float()}
        if options.get("pivoted"):
            pivots, free, mix = pivot(result.basis)
            bank = {"basis": free.float(), "pivots": pivots.int()}
            first = coefficients.shape[-1] - len(pivots)
            coefficients = torch.cat([coefficients[..., :first], coefficients[..., first:] @ mix], -1)
        members = [
            self._member(form, own, c[: form.out_channels], bool(options.get("pivoted")))
            for form, own, c in zip(forms, result.own, coefficients, strict=True)
        ]
        return Solution(bank, members, per_layer(len(forms), flat, result.errors))

    def solve_own(self, problem: GroupProblem, layer: BasisConv) -> dict[str, Tensor]:
        """The tensors of one member, its own filters solved again from those it has; the bank stays."""
        form = layer.form
        filters, _ = cast("tuple[Tensor, Tensor]", layer.linear_part())
        own = layer.columns() if isinstance(layer, HybridConv) else filters[: layer.own_columns]
        result = shared_and_own.solve_own(
            problem.flat(), filters[layer.own_columns :].flatten(1), own.detach().flatten(1)[None], kind_of(form)
        )
        return self._member(form, result.own[0], result.coefficients[0], layer.pivots is not None)

    @staticmethod
    def _member(form: ConvForm, own: Tensor, coefficients: Tensor, pivoted: bool) -> dict[str, Tensor]:
        """One layer's tensors, of its own filters (r, J), perhaps wider than it needs, and its coefficients (O, M)."""
        name, shape = own_tensor(form)
        own = own[:, : own_inputs([form])[0]]
        if not pivoted:
            return {"coefficients": coefficients.float(), name: own.reshape(-1, *shape).float()}
        pivots, free, mix = pivot(own)
        count, wide = len(own), _width(form)
        mixed = torch.einsum("orb,rs->osb", coefficients[:, : count * wide].unflatten(1, (count, wide)), mix).flatten(1)
        coefficients = torch.cat([mixed, coefficients[:, count * wide :]], 1)
        return {"coefficients": coefficients.float(), name: free.float(), "pivots": pivots.int()}

    def columns(self, forms: list[ConvForm]) -> int:
        return max(form.features for form in forms)

    def fits(self, forms: list[ConvForm], options: dict[str, Any]) -> bool:
        return super().fits(forms, options) and (not options.get("pivoted") or options["own"] < min(own_inputs(forms)))

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        columns, narrow = max(form.features for form in forms), min(own_inputs(forms))
        rank = min(columns, sum(form.out_channels for form in forms))
        own = min(narrow, min(form.out_channels for form in forms) * _width(forms[0]))
        return {"rank": rank, "own": own}

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        rank, own, widest = int(options["rank"]), int(options["own"]), max(forms, key=lambda form: form.features)
        pivoted = bool(options.get("pivoted"))
        bank = {"basis": torch.zeros(rank, *widest.weight_shape[1:])}
        # A narrow layer that stands in for itself alone may have fewer inputs than the bank has filters.
        if pivoted and rank < widest.features:
            bank = blank_pivots("basis", rank, widest.features)

        def member(form: ConvForm) -> dict[str, Tensor]:
            name, shape = own_tensor(form)
            filters = blank_pivots(name, own, own_inputs([form])[0]) if pivoted else {name: torch.zeros(own, *shape)}
            return {"coefficients": torch.zeros(form.out_channels, own * _width(form) + rank), **filters}

        return Solution(bank, [member(form) for form in forms])

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        assert bank is not None
        bias, gain, pivots = kept.get("bias"), kept.get("gain"), tensors.get("pivots")
        if kind_of(form) == "columns":
            return HybridConv(form, tensors["coefficients"], bank, tensors["vertical"], bias, gain, pivots)
        return BasisConv(
            form, tensors["coefficients"], bank, unique=tensors["unique"], bias=bias, gain=gain, pivots=pivots
        )


def kind_of(form: ConvForm) -> Kind:
    """Own filters stand in every column of the kernel; where it has one row or column they are whole."""
    return "columns" if min(form.kernel_size) > 1 else "rows"


def own_tensor(form: ConvForm) -> tuple[str, tuple[int, ...]]:
    """Name of the tensor that holds a layer's own filters, and the shape of one of them."""
    _, channels, height, width = form.weight_shape
    return ("vertical", (channels, height, 1)) if kind_of(form) == "columns" else ("unique", (channels, height, width))


def own_inputs(forms: Sequence[ConvForm]) -> list[int]:
    """Numbers in one own filter, per layer."""
    return [form.features // _width(form) for form in forms]


def _width(form: ConvForm) -> int:
    """Coefficients of one own filter in every output."""
    return form.kernel_size[1] if kind_of(form) == "columns" else 1


def _most(limit: int, cost: float, price: Callable[[int], float]) -> int:
    """The largest count of 1 .. ``limit`` whose ``price``, which grows with it, is at most ``cost``; else 1."""
    return max(1, bisect_right(range(1, limit + 1), cost, key=price))


def _between(cost: float, costs: Sequence[float], errors: Sequence[Tensor]) -> Tensor:
    """Errors (K,) at ``cost``, between those at ``costs``, by their logarithms."""
    logs = torch.stack(list(errors)).double().clamp_min(1e-12).log().cpu().numpy()
    from scipy.interpolate import PchipInterpolator  # a quarter of a second, for those who get here

    found = PchipInterpolator(costs, logs)(cost) if len(costs) > 1 else logs[0]
    return torch.from_numpy(np.exp(found)).to(errors[0])
