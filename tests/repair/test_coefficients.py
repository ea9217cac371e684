"""Coefficients against least squares in float64, errors against brute force, choices against grids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sharefold.repair import coefficients
from sharefold.repair.coefficients import RIDGES, Linear, best_ridge, best_step, fitted, halves_of, sums_of
from sharefold.solvers.moments import PairSums

GROUPS, FILTERS, OUTPUTS = 2, 5, 3


def drawn(samples: int, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor, Linear]:
    """Responses (G, M, P) with a mean, wanted outputs (G, O/G, P) by a true map and noise, and that map."""
    generator = torch.Generator().manual_seed(seed)
    truth = Linear(*(torch.randn(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
                     for shape in ((GROUPS, OUTPUTS, FILTERS), (GROUPS, OUTPUTS))))  # fmt: skip
    a = torch.randn(GROUPS, FILTERS, samples, generator=generator, dtype=torch.float64) + 1.5
    wanted = truth(a)
    return a, wanted + noise * torch.randn(wanted.shape, generator=generator, dtype=torch.float64), truth


def other(seed: int = 5) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    return Linear(*(torch.randn(*shape, generator=generator, dtype=torch.float64)
                    for shape in ((GROUPS, OUTPUTS, FILTERS), (GROUPS, OUTPUTS))))  # fmt: skip


def sums(a: Tensor, y: Tensor) -> PairSums:
    found = sums_of(a, y)
    assert found is not None
    return found


def brute(found: Linear, a: Tensor, y: Tensor) -> float:
    return float((found(a) - y).square().sum((0, 1)).mean())


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("ridge", [1e-12, 0.5])
def test_the_map_is_that_of_stacked_least_squares(free: bool, ridge: float) -> None:
    a, y, _ = drawn(60)
    start = other()
    found = fitted(sums(a, y), start, ridge, free)
    assert found is not None
    for group in range(GROUPS):
        x, t = a[group].T, y[group].T
        x_mean, t_mean = (x.mean(0), t.mean(0)) if free else (torch.zeros(FILTERS), start.constant[group])
        x, t = x - x_mean, t - t_mean
        # The pull as rows of their own: sqrt(P rho) I C = sqrt(P rho) C0.
        pull = (len(x) * ridge * x.square().mean()).sqrt() * torch.eye(FILTERS, dtype=x.dtype)
        best = torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([t, pull @ start.weight[group].T])).solution.T
        torch.testing.assert_close(found.weight[group], best, rtol=1e-8, atol=1e-8)
        constant = t_mean - best @ x_mean if free else start.constant[group]
        torch.testing.assert_close(found.constant[group], constant, rtol=1e-8, atol=1e-8)


def test_no_finite_solution_and_no_samples() -> None:
    a, y, _ = drawn(8)
    a[0, 0, 0] = float("nan")
    assert sums_of(a, y) is None
    assert sums_of(a[:, :, :0], y[:, :, :0]) is None


@pytest.mark.parametrize("images", [4, 1], ids=["both halves", "even images alone"])
def test_halves_are_the_sums_of_even_and_odd_images_and_of_all(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, y = (torch.randn(2, n, 40, generator=generator, dtype=torch.float64) for n in (3, 5))
    image = torch.arange(40) % images
    found = halves_of(a, y, image)
    for half, pick in zip(found, (image % 2 == 0, image % 2 == 1, image >= 0), strict=True):
        wanted = sums_of(a[..., pick], y[..., pick])
        assert (half is None) == (wanted is None)
        for key in ("gram", "mean", "cross", "mean_y", "variance") if wanted is not None else ():
            torch.testing.assert_close(getattr(half, key), getattr(wanted, key))


def test_errors_are_those_of_brute_force() -> None:
    a, y, truth = drawn(40)
    for found in (truth, other(), truth.towards(other(), 0.3)):
        assert found.error(sums(a, y)) == pytest.approx(brute(found, a, y), rel=1e-10)


def test_between_two_maps() -> None:
    a, _, truth = drawn(4)
    halfway = truth.towards(other(), 0.25)
    torch.testing.assert_close(halfway(a), 0.75 * truth(a) + 0.25 * other()(a))
    assert truth(a.float()).dtype == torch.float32


@pytest.mark.parametrize(
    "pair",
    [
        lambda truth: (other(), truth),
        lambda truth: (truth, other()),
        lambda truth: (other(), truth.towards(other(), -0.5)),  # beyond the best: part of the way
        lambda truth: (other(), truth.towards(other(), 0.5)),  # not far enough: all of the way
        lambda truth: (other(), other(6)),
    ],
    ids=["to the truth", "from it", "beyond", "half of the way", "elsewhere"],
)
def test_the_step_is_the_best_of_a_dense_grid(pair: Callable[[Linear], tuple[Linear, Linear]]) -> None:
    a, y, truth = drawn(50)
    old, new = pair(truth)
    step = best_step(old, new, sums(a, y))
    grid = torch.linspace(0, 1, 2001).tolist()
    best = min(grid, key=lambda t: brute(old.towards(new, t), a, y))
    assert step == pytest.approx(best, abs=1e-3) and 0 <= step <= 1


def test_no_step_where_nothing_changes() -> None:
    a, y, truth = drawn(50)
    assert best_step(truth, truth, sums(a, y)) == 0.0


def choice(samples: int, noise: float, free: bool = True) -> float:
    """The pull that is chosen for that many samples a half, from a start near the truth."""
    (a, y, truth), (b, z, _) = (drawn(samples, noise, seed) for seed in (1, 2))
    start = truth.towards(other(), 0.1)
    return best_ridge((sums(a, y), sums(b, z)), start, free)


@pytest.mark.parametrize("free", [True, False])
def test_few_noisy_samples_are_pulled_and_many_are_not(free: bool) -> None:
    assert choice(8, 3.0, free) == RIDGES[-1]
    assert choice(20_000, 0.3, free) == RIDGES[0]


def test_the_pull_is_the_one_of_least_error_on_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coefficients, "RIDGES", (1e-4, 1e-1, 0.3, 1.0, 3.0, 100.0))
    (a, y, truth), (b, z, _) = (drawn(12, 1.0, seed) for seed in (3, 4))
    start = truth.towards(other(), 0.3)
    found = best_ridge((sums(a, y), sums(b, z)), start, True)

    def crossed(ridge: float) -> float:
        there, here = (fitted(sums(*pair), start, ridge, True) for pair in ((a, y), (b, z)))
        assert there is not None and here is not None
        return brute(there, b, z) + brute(here, a, y)

    assert found == min(coefficients.RIDGES, key=crossed)
