from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from sharefold.errors import SharefoldError
from sharefold.solvers import align
from sharefold.solvers.data_norm import Problem

from .problems import moments, non_increasing


def blocks(noise: float, members: int = 3, channels: int = 8, seed: int = 0):
    """Blocks that are noisy copies of one another with their inner channels shuffled."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(channels, 9, generator=generator, dtype=torch.float64)
    second = torch.randn(6, channels * 9, generator=generator, dtype=torch.float64)
    inner = moments(1, channels * 9, seed=seed)[0]
    shuffles = torch.stack([torch.randperm(channels, generator=generator) for _ in range(members)])
    firsts, seconds, inners = [], [], []
    for shuffle in shuffles:
        columns = align.column_index(shuffle, 9)
        jitter = torch.randn(first.shape, generator=generator, dtype=torch.float64)
        firsts.append(first[shuffle] + noise * jitter)
        jitter = torch.randn(second.shape, generator=generator, dtype=torch.float64)
        seconds.append(second[:, columns] + noise * jitter)
        inners.append(inner[columns][:, columns])
    sides = [
        align.Side(Problem(torch.stack(firsts), moments(members, 9, seed=seed + 1)), "rows"),
        align.Side(Problem(torch.stack(seconds), torch.stack(inners), kernel=(3, 3)), "columns"),
    ]
    return sides, shuffles


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)])
def test_planted_shuffles_are_undone(noise: float, which: tuple[int, ...]) -> None:
    sides, shuffles = blocks(noise)
    result = align.solve([sides[i] for i in which])
    planted = sum(align._State(sides[i]).objective(shuffles.argsort(dim=1)) for i in which)
    assert result.history[-1] <= planted + 1e-9
    if not noise:
        # Undone up to one common order: the planted channel behind every slot agrees between blocks.
        found = shuffles.gather(1, result.permutations)
        assert all(torch.equal(row, found[0]) for row in found)
    assert non_increasing(result.history)
    assert result.history[-1] < 0.2 * result.history[0]


def test_row_alignment_of_two_blocks_is_the_best_of_all_permutations() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
        side = align.Side(Problem(weights, moments(2, 7, seed=seed), layer_weights=torch.ones(2)), "rows")
        result = align.solve([side])
        states = [align._State(side)]
        identity = torch.arange(5)
        scores = [
            states[0].objective(torch.stack([identity, torch.tensor(p)])) for p in itertools.permutations(range(5))
        ]
        # Coordinate descent on the mean is a local search; it must come close to the best of all 120.
        assert result.history[-1] <= 1.05 * min(scores)


def test_objective_is_the_tied_error() -> None:
    sides, _ = blocks(0.5)
    result = align.solve(sides)
    total = 0.0
    for side in sides:
        permuted = align.apply(side, result.permutations)
        mass = permuted.objective_weights[:, None] * permuted.row_metric
        mean = (mass.unsqueeze(2) * permuted.weights).sum(0) / mass.sum(0)[:, None]
        total += permuted.error_sum(mean.expand_as(permuted.weights))
    assert result.history[-1] == pytest.approx(total, rel=1e-9)


def test_a_permuted_block_computes_the_same_function() -> None:
    sides, _ = blocks(0.5)
    permutation = torch.randperm(8)
    permutations = permutation.expand(3, 8)
    x = torch.randn(2, 9, 5, 5, dtype=torch.float64)
    outputs = []
    for one, two in (
        (sides[0].problem, sides[1].problem),
        (align.apply(sides[0], permutations), align.apply(sides[1], permutations)),
    ):
        inner = F.relu(F.conv2d(x, one.weights[1].reshape(8, 9, 1, 1)))
        outputs.append(F.conv2d(inner, two.weights[1].reshape(6, 8, 3, 3), padding=1))
    torch.testing.assert_close(*outputs)


def test_refusals_and_single_block() -> None:
    sides, _ = blocks(0.1)
    with pytest.raises(SharefoldError, match="axis"):
        align.solve([align.Side(sides[0].problem, "both")])
    with pytest.raises(SharefoldError, match="disagree"):
        align.solve([sides[0], align.Side(sides[1].problem, "rows")])
    with pytest.raises(SharefoldError, match="no matrices"):
        align.solve([])
    single = align.solve([align.Side(sides[0].problem.select([0]), "rows")])
    assert torch.equal(single.permutations, torch.arange(8)[None])
