"""Wide layers are solved in float32; here that path is forced on small problems and compared with float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from sharefold.solvers import (
    align,
    block_diagonal,
    data_norm,
    kmeans,
    low_rank,
    separable,
    shared_and_own,
    shared_basis,
    tie,
    tucker_als,
)  # fmt: skip
from sharefold.solvers.data_norm import Problem
from sharefold.solvers.variable_projection import VariableProjection

from .problems import non_increasing, problem

SOLVERS: dict[str, Callable[[Problem], object]] = {
    "basis": lambda p: shared_basis.solve(p, 8),
    "basis with own filters": lambda p: shared_basis.solve(p, 6, unique=1),
    "svd": lambda p: low_rank.svd_solve(p, 4),
    "spatial": lambda p: separable.solve(p, 4),
    "tie": lambda p: tie.solve(p),
    "tucker": lambda p: tucker_als.solve(p, 8, 3),
    "layers": lambda p: kmeans.solve(p, 2, "layer"),
    "filters": lambda p: kmeans.solve(p, 8, "filter"),
    "kernels": lambda p: kmeans.solve(p, 16, "kernel"),
}


@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_single_precision_matches_double(name: str, deficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = problem(4, 8, 45, kernel=(3, 3), deficient=deficient)
    double = SOLVERS[name](group)
    monkeypatch.setattr(data_norm, "FLOAT64_LIMIT", 0)
    single_group = group.to(torch.float32)
    assert single_group.working().weights.dtype == torch.float32
    single = SOLVERS[name](single_group)
    approximation: Tensor = single.approximation
    assert approximation.dtype == torch.float32
    errors = group.errors(approximation.double())
    torch.testing.assert_close(single.errors.double(), errors, rtol=1e-2, atol=2e-4)
    # Local optima may differ at the clusters' discrete choices, hence the loose bound.
    assert float(errors.sum()) <= 1.1 * float(double.errors.sum()) + 1e-4
    assert non_increasing(getattr(single, "history", []), 1e-4)


@pytest.mark.parametrize("deficient", [False, True])
def test_curves_and_pairs_in_single_precision(deficient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    group = problem(3, 8, 36, kernel=(3, 3), deficient=deficient)
    pointwise = problem(2, 8, 12, deficient=deficient)
    double = [shared_basis.curve(group), low_rank.svd_curve(group), separable.curve(group), tucker_als.curve(group)]
    pair = block_diagonal.solve(pointwise, 4)
    moves = align.solve([align.Side(group, "rows"), align.Side(problem(3, 6, 72, kernel=(3, 3)), "columns")])
    monkeypatch.setattr(data_norm, "FLOAT64_LIMIT", 0)
    small = group.to(torch.float32)
    single = [shared_basis.curve(small), low_rank.svd_curve(small), separable.curve(small), tucker_als.curve(small)]
    for exact, rough in zip(double[:3], single[:3], strict=True):
        for a, b in zip(exact, rough, strict=True):
            assert b.errors.dtype == torch.float32 and a.cost == b.cost
            torch.testing.assert_close(a.errors, b.errors.double(), rtol=2e-2, atol=1e-3)
    assert all(torch.isfinite(p.errors).all() for p in single[3])
    rough_pair = block_diagonal.solve(pointwise.to(torch.float32), 4)
    torch.testing.assert_close(pair.errors, rough_pair.errors.double(), rtol=5e-2, atol=1e-4)
    again = align.solve(
        [
            align.Side(small, "rows"),
            align.Side(problem(3, 6, 72, kernel=(3, 3)).to(torch.float32), "columns"),
        ]
    )
    assert again.history[-1] == pytest.approx(moves.history[-1], rel=1e-2)


def test_estimates_of_middling_problems_are_single_and_agree() -> None:
    group = problem(3, 16, 288, kernel=(3, 3)).to(torch.float32)
    assert group.working().weights.dtype == torch.float64
    rough = group.for_estimates()
    assert rough.working().weights.dtype == torch.float32 and rough.working().estimate
    assert problem(3, 16, 144, kernel=(3, 3)).to(torch.float32).for_estimates().working().weights.dtype == torch.float64
    sizes = [(4, 2), (12, 6)]
    for curve in (shared_basis.curve, low_rank.svd_curve, partial(separable.curve, iterations=2, solved=2)):
        for a, b in zip(curve(group), curve(rough), strict=True):
            torch.testing.assert_close(a.errors.float(), b.errors.float(), rtol=5e-3, atol=1e-4)
    exact = shared_and_own.curve(VariableProjection(group), sizes, [8, 12])
    for a, b in zip(exact, shared_and_own.curve(VariableProjection(rough), sizes, [8, 12]), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=5e-3, atol=1e-4)
