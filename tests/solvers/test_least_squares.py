"""Pulled least squares against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharefold.solvers.least_squares import PulledLeastSquares


def samples(groups: int = 2, features: int = 6, outputs: int = 4, count: int = 50, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs (G, N, P), wanted outputs (G, O, P) and a start (G, O, N), float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, features, features, generator=generator, dtype=torch.float64)
    a = mixing @ torch.randn(groups, features, count, generator=generator, dtype=torch.float64)
    y = torch.randn(groups, outputs, count, generator=generator, dtype=torch.float64)
    return a, y, torch.randn(groups, outputs, features, generator=generator, dtype=torch.float64)


def moments(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return a @ a.transpose(1, 2) / a.shape[2], y @ a.transpose(1, 2) / a.shape[2]


def brute_force(a: Tensor, y: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The minimum of E|y - C a|^2 + rho |C - C0|^2, by stacking samples and pull into one plain least-squares problem."""
    found = []
    for inputs, wanted, old in zip(a, y, start, strict=True):
        count, features = inputs.shape[1], inputs.shape[0]
        rho = ridge * float(inputs.square().sum()) / count / features
        rows = torch.cat([inputs.T / count**0.5, rho**0.5 * torch.eye(features, dtype=a.dtype)])
        targets = torch.cat([wanted.T / count**0.5, rho**0.5 * old.T])
        found.append(torch.linalg.lstsq(rows, targets).solution.T)
    return torch.stack(found)


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1e-2, 1.0, 100.0])
def test_it_is_the_minimum_of_error_and_pull(ridge: float) -> None:
    a, y, start = samples()
    gram, cross = moments(a, y)
    expected = brute_force(a, y, start, ridge)
    system = PulledLeastSquares(gram, ridge)
    solved = system.solve(cross, start)
    assert solved is not None and solved.dtype == torch.float64
    torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(system.robust(cross, start), expected, rtol=1e-6, atol=1e-8)
    factor = system.factored()
    assert factor is not None
    torch.testing.assert_close(
        torch.cholesky_solve(system.right(cross, start), factor).transpose(1, 2), expected, rtol=1e-8, atol=1e-10
    )


def test_every_group_is_pulled_by_its_own_size() -> None:
    a, y, start = samples()
    a[1] *= 1000  # its neighbour feels nothing of that
    gram, cross = moments(a, y)
    both = PulledLeastSquares(gram, 0.1)
    torch.testing.assert_close(both.rho.flatten(), 0.1 * a.square().mean((1, 2)))
    solved = both.solve(cross, start)
    for k in range(2):
        alone = PulledLeastSquares(gram[k], 0.1).solve(cross[k], start[k])
        assert solved is not None and alone is not None
        torch.testing.assert_close(solved[k], alone)
        torch.testing.assert_close(alone, brute_force(a, y, start, 0.1)[k])


def test_directions_without_samples_keep_what_they_have() -> None:
    a, y, start = samples(groups=1)
    a[:, 4:] = 0  # two inputs that are never seen
    gram, cross = moments(a, y)
    solved = PulledLeastSquares(gram, 1e-3).solve(cross, start)
    assert solved is not None
    torch.testing.assert_close(solved[..., 4:], start[..., 4:])
    assert float((solved[..., :4] - start[..., :4]).abs().min()) > 1e-4


def test_a_silent_layer_keeps_all_of_it() -> None:
    _, _, start = samples()
    nothing = torch.zeros(2, 6, 6, dtype=torch.float64)
    solved = PulledLeastSquares(nothing, 1e-3).solve(torch.zeros_like(start), start)
    assert solved is not None
    torch.testing.assert_close(solved, start)


def test_no_pull_is_plain_least_squares() -> None:
    a, y, start = samples()
    solved = PulledLeastSquares(moments(a, y)[0], 0.0).solve(moments(a, y)[1], start)
    plain = torch.linalg.lstsq(a.transpose(1, 2), y.transpose(1, 2)).solution.transpose(1, 2)
    assert solved is not None
    torch.testing.assert_close(solved, plain, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("broken", ["gram", "cross", "start"])
def test_what_is_not_finite_has_no_solution(broken: str) -> None:
    a, y, start = samples()
    gram, cross = moments(a, y)
    {"gram": gram, "cross": cross, "start": start}[broken][0, 0, 0] = float("nan")
    system = PulledLeastSquares(gram, 1e-3)
    assert system.solve(cross, start) is None
    assert (system.factored() is None) == (broken == "gram")


def test_an_indefinite_moment_has_no_factor() -> None:
    assert PulledLeastSquares(-torch.eye(3, dtype=torch.float64), 1e-3).factored() is None


def test_robust_solves_what_is_numerically_singular() -> None:
    """A rank-deficient moment whose pull is below what float64 can see beside it."""
    a, y, start = samples(groups=1, features=8, count=5)
    a *= torch.tensor([1e8] + [1.0] * 7, dtype=torch.float64)[:, None]
    gram, cross = moments(a, y)
    solved = PulledLeastSquares(gram, 1e-14).robust(cross, start)
    assert bool(torch.isfinite(solved).all())
    expected = brute_force(a, y, start, 1e-14)
    error = (solved @ a - y).square().mean()
    assert float(error) <= 1.01 * float((expected @ a - y).square().mean()) + 1e-6
