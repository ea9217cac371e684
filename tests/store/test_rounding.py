"""Rounding that passes errors on: what it must leave alone, and what it must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharefold.solvers.grid import search_scale
from sharefold.store import rounding
from sharefold.store.rounding import round_matrix
from sharefold.store.tensor_spec import TensorSpec, scaled


def moments(columns: int, samples: int) -> Tensor:
    """Correlated moments (1, N, N) of so many samples."""
    x = torch.randn(samples, columns) @ torch.randn(columns, columns)
    return (x.T @ x / samples).unsqueeze(0)


def spec_of(matrix: Tensor, bits: int) -> TensorSpec:
    return scaled("grid", search_scale(matrix, bits), bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("samples", [600, 75])  # the latter show half of the directions
def test_passing_errors_on_beats_nearest(bits: int, samples: int) -> None:
    totals = {"nearest": 0.0, "passed on": 0.0}
    for _ in range(3):
        matrix, metric = torch.randn(16, 150), moments(150, samples)
        spec = spec_of(matrix, bits)
        for name, given in (("nearest", None), ("passed on", metric)):
            found = round_matrix(matrix, spec, given)
            assert torch.equal(spec.snapped(found), found)
            gap = (matrix - found).double()
            totals[name] += float(((gap @ metric[0].double()) * gap).sum())
    assert totals["passed on"] < 0.8 * totals["nearest"]


def test_inputs_that_are_not_correlated_get_nothing_from_others() -> None:
    matrix = torch.randn(8, 20)
    spec = spec_of(matrix, 4)
    assert torch.equal(round_matrix(matrix, spec, torch.eye(20)[None]), round_matrix(matrix, spec, None))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, metric = torch.randn(4, 40), moments(40, 160)
    spec = spec_of(matrix, 4)
    whole = round_matrix(matrix, spec, metric)
    monkeypatch.setattr(rounding, "_BLOCK", 7)
    assert torch.equal(round_matrix(matrix, spec, metric), whole)


def test_grid_points_are_kept_and_dead_inputs_are_harmless() -> None:
    codes = torch.randint(-7, 8, (5, 12))
    spec = scaled("grid", torch.rand(5) + 0.5, 4)
    matrix = spec.values(codes)
    assert torch.equal(round_matrix(matrix, spec, moments(12, 48)), matrix)
    other = torch.randn(5, 12)
    assert torch.equal(round_matrix(other, spec, torch.zeros(1, 12, 12)), round_matrix(other, spec, None))
