"""Backward elimination of channels against brute force in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from sharefold.errors import SharefoldError
from sharefold.solvers.channel_elimination import (
    Reader,
    column_index,
    compensation,
    eliminate,
    error_without,
    left_out,
)  # fmt: skip


def _reader(channels: int, block: int, rows: int, seed: int) -> Reader:
    generator = torch.Generator().manual_seed(seed)
    size = channels * block
    x = torch.randn(6 * size, size, generator=generator, dtype=torch.float64) @ torch.randn(
        size, size, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return Reader(weight, x.T @ x / len(x), torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1)


def _least_squares(reader: Reader, kept: list[int], channels: int) -> tuple[torch.Tensor, float]:
    """Weights on the kept columns by the normal equations, and the error they leave."""
    block = len(reader.moment) // channels
    mine = column_index(torch.tensor(kept), block)
    weights = torch.linalg.solve(reader.moment[mine][:, mine], reader.moment[mine] @ reader.weight.T).T
    change = reader.weight.clone()
    change[:, mine] -= weights
    return weights, float((((change @ reader.moment) * change).sum(1) * reader.rows).sum())


@pytest.mark.parametrize(("channels", "blocks"), [(7, (1,)), (5, (4,)), (6, (1, 9))])
def test_every_step_takes_the_channel_that_costs_least(channels: int, blocks: tuple[int, ...]) -> None:
    readers = [_reader(channels, block, 5 + block, seed) for seed, block in enumerate(blocks)]
    found = eliminate(readers, channels)
    kept = list(range(channels))
    for step, gone in enumerate(found.order.tolist()):
        costs = {
            c: sum(_least_squares(r, [k for k in kept if k != c], channels)[1] for r in readers) for c in kept
        }
        assert gone == min(costs, key=lambda c: costs[c])
        kept.remove(gone)
        for k, reader in enumerate(readers):
            assert float(found.errors[k, step + 1]) == pytest.approx(_least_squares(reader, kept, channels)[1], rel=1e-9)
        assert found.kept(len(kept)).tolist() == kept


def test_shares_say_which_reader_matters() -> None:
    readers = [_reader(6, 1, 4, seed) for seed in (7, 8)]
    alone = eliminate([readers[1]], 6)
    both = eliminate(readers, 6, shares=[1e-9, 1.0])
    assert torch.equal(alone.order, both.order)
    torch.testing.assert_close(alone.errors[0], both.errors[1])


def test_panels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = [_reader(40, 3, 12, 0), _reader(40, 1, 50, 1)]
    whole = eliminate(readers, 40, fewest=4)
    monkeypatch.setattr("sharefold.solvers.channel_elimination.PANEL", 1)
    monkeypatch.setattr("sharefold.solvers.channel_elimination.PANEL_SHARE", 0)
    single = eliminate(readers, 40, fewest=4)
    assert torch.equal(whole.order, single.order)
    torch.testing.assert_close(whole.errors, single.errors, rtol=1e-9, atol=0)
    assert len(whole.order) == 36


def test_compensation_is_least_squares_and_its_error_the_curves() -> None:
    reader = _reader(6, 4, 9, 3)
    found = eliminate([reader], 6)
    for count in (5, 3, 1):
        kept = found.kept(count)
        expected, error = _least_squares(reader, kept.tolist(), 6)
        mine, others = column_index(kept, 4), column_index(left_out(kept, 6), 4)
        weights = reader.weight[:, mine] + reader.weight[:, others] @ compensation(reader.moment, kept, 6)
        torch.testing.assert_close(weights, expected)
        assert error_without(reader, kept, 6, compensation(reader.moment, kept, 6)) == pytest.approx(error)
        assert float(found.errors[0, 6 - count]) == pytest.approx(error)


def test_close_to_the_best_subset() -> None:
    reader = _reader(8, 1, 6, 4)
    errors = eliminate([reader], 8).errors[0]
    for count in (7, 5):
        best = min(_least_squares(reader, list(kept), 8)[1] for kept in itertools.combinations(range(8), count))
        assert best - 1e-9 <= float(errors[8 - count]) <= 1.5 * best


def test_a_copy_of_a_channel_goes_first_and_for_nothing() -> None:
    reader = _reader(5, 2, 4, 5)
    mix = torch.eye(10, dtype=torch.float64)
    mix[8:10] = mix[2:4]  # channel 4 says what channel 1 says
    moment = mix @ reader.moment @ mix.T + 1e-9 * torch.eye(10, dtype=torch.float64)
    found = eliminate([Reader(reader.weight, moment, reader.rows)], 5, fewest=4)
    assert found.order.tolist() in ([1], [4])
    assert float(found.errors[0, 1]) < 1e-6 * float(((reader.weight @ moment) * reader.weight).sum())


@pytest.mark.parametrize("seed", range(6))
def test_directions_that_no_image_reaches_do_no_harm(seed: int) -> None:
    """A few images and a ridge near rounding: inverses of 1e13, from which 1e13 is subtracted."""
    generator = torch.Generator().manual_seed(seed)
    channels, block = 12, 9
    x = torch.randn(5, channels * block, generator=generator, dtype=torch.float64)
    x[:, : 2 * block] = 0  # dead channels
    moment = x.T @ x / len(x) + 1e-13 * torch.eye(channels * block, dtype=torch.float64)
    reader = Reader(torch.randn(4, channels * block, generator=generator, dtype=torch.float64), moment, torch.ones(4).double())
    found = eliminate([reader], channels, fewest=1)
    assert sorted(found.order.tolist()) == sorted(set(found.order.tolist())) and len(found.order) == channels - 1
    # One channel of nine columns still says all that five images do.
    assert float(found.errors.max()) < 1e-6 * float(((reader.weight @ moment) * reader.weight).sum())
    mix = compensation(moment, found.kept(6), channels)
    assert mix.shape == (54, 54) and bool(torch.isfinite(mix).all())


def test_bad_shapes_say_so() -> None:
    reader = _reader(6, 1, 3, 6)
    with pytest.raises(SharefoldError, match="6 columns"):
        eliminate([reader], 4)
    with pytest.raises(SharefoldError, match="not positive definite"):
        eliminate([Reader(reader.weight, -reader.moment, reader.rows)], 6)
