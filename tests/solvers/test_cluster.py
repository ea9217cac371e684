from __future__ import annotations

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.solvers import kmeans, tie
from sharefold.solvers.data_norm import Problem

from .problems import moments, non_increasing, problem


@pytest.mark.parametrize("grain, clusters", [("layer", 2), ("filter", 5), ("kernel", 6)])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("deficient", [False, True])
def test_descent_errors_and_cost(grain: str, clusters: int, scale: bool, deficient: bool) -> None:
    group = problem(4, 5, 18, kernel=(3, 3), deficient=deficient)
    solution = kmeans.solve(group, clusters, grain, scale=scale, tol=0)
    assert non_increasing(solution.history)
    assert len(solution.history) > 1
    torch.testing.assert_close(solution.errors, group.errors(solution.approximation))
    assert group.error_sum(solution.approximation) == pytest.approx(solution.history[-1], rel=1e-2, abs=1e-4)
    assert (solution.parameters, solution.bits) == kmeans.cost(grain, clusters, group, scale)
    assert int(solution.codes.max()) < clusters
    again = kmeans.solve(group, clusters, grain, scale=scale, tol=0)
    assert torch.equal(again.codes, solution.codes)


@pytest.mark.parametrize("grain, clusters", [("layer", 3), ("filter", 15), ("kernel", 30)])
def test_one_entry_each_is_exact(grain: str, clusters: int) -> None:
    solution = kmeans.solve(problem(3, 5, 18, kernel=(3, 3)), clusters, grain)
    assert float(solution.errors.max()) < 1e-6


def test_one_layer_cluster_is_the_tied_kernel() -> None:
    group = problem(3, 5, 12)
    for scale in (False, True):
        tied = tie.solve(group, "data", scale, rounds=200, tol=0)
        clustered = kmeans.solve(group, 1, "layer", scale=scale, rounds=300, tol=0)
        assert float(clustered.errors.sum()) == pytest.approx(float(tied.errors.sum()), rel=1e-2)


def test_planted_layers_are_found() -> None:
    base = torch.randn(2, 5, 12, dtype=torch.float64)
    weights = base[[0, 1, 0, 1, 0]] + 0.05 * torch.randn(5, 5, 12, dtype=torch.float64)
    solution = kmeans.solve(Problem(weights, moments(5, 12)), 2, "layer")
    codes = solution.codes.tolist()
    assert codes[0] == codes[2] == codes[4] != codes[1] == codes[3]


@pytest.mark.parametrize("grain", ["filter", "kernel"])
def test_planted_codebook_is_found(grain: str) -> None:
    generator = torch.Generator().manual_seed(4)
    width = 18 if grain == "filter" else 9
    codebook = torch.randn(4, width, generator=generator, dtype=torch.float64)
    codes = torch.randint(0, 4, (3, 6, 18 // width), generator=generator)
    weights = codebook[codes].flatten(2) * (0.5 + torch.rand(3, 6, 1, generator=generator, dtype=torch.float64))
    group = Problem(weights, moments(3, 18), kernel=(3, 3))
    found = min(
        float(kmeans.solve(group, 4, grain, generator=torch.Generator().manual_seed(s), rounds=50).errors.max())
        for s in range(4)
    )
    assert found < 1e-4


def test_filter_assignment_is_the_brute_force_best() -> None:
    group = problem(2, 4, 10)
    solution = kmeans.solve(group, 3, "filter", scale=False, rounds=0)
    for k in range(2):
        for o in range(4):
            gaps = group.weights[k, o] - solution.codebook
            errors = ((gaps @ group.second[k]) * gaps).sum(1)
            assert int(errors.argmin()) == int(solution.codes[k, o])


def test_slice_sweep_is_coordinatewise_best() -> None:
    group = problem(2, 3, 18, kernel=(3, 3))
    work = kmeans._Slices(group, 0.0)
    codebook = torch.randn(4, 9, dtype=torch.float64)
    scales = torch.rand(2, 3, dtype=torch.float64) + 0.5
    codes = work.assign(codebook, torch.zeros(2, 3, 2, dtype=torch.int64), scales)
    # The last channel visited is the best of all codes given the others.
    scores = []
    for code in range(4):
        trial = codes.clone()
        trial[:, :, 1] = code
        gap = group.weights - work.compose(codebook, trial, scales)
        scores.append((gap @ group.second * gap).sum(2))
    assert torch.equal(torch.stack(scores).argmin(0), codes[:, :, 1])


def test_slice_codebook_solves_the_normal_equations() -> None:
    group = problem(2, 3, 18, kernel=(3, 3))
    work = kmeans._Slices(group, 0.0)
    codes = torch.randint(0, 2, (2, 3, 2))
    scales = torch.rand(2, 3, dtype=torch.float64) + 0.5
    got = work.update(torch.zeros(2, 9, dtype=torch.float64), codes, scales, steps=100)
    shared = got.clone().requires_grad_()
    gap = group.weights - work.compose(shared, codes, scales)
    (gradient,) = torch.autograd.grad((work.mass * (gap @ group.second * gap).sum(2)).sum(), shared)
    assert float(gradient.abs().max()) < 1e-6


def test_refusals() -> None:
    with pytest.raises(SharefoldError, match="grain"):
        kmeans.solve(problem(), 2, "weights")
    with pytest.raises(SharefoldError, match="1 to 3 layers"):
        kmeans.solve(problem(), 4, "layer")
