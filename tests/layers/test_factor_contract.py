"""What store and fine-tuning ask of a layer: its own factor, what that is worth, and its coefficients multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sharefold.layers import Bank, BasisConv, HybridConv, SharedConv, SpatialConv, TiedConv, form_of, free_columns

CONV = nn.Conv2d(4, 6, (3, 2), bias=False)
FORM = form_of(CONV)
assert FORM is not None
CASES = ["basis", "spatial", "hybrid"]


def layer_of(kind: str, pivoted: bool = False) -> SharedConv:
    torch.manual_seed(0)
    bank = Bank({"basis": torch.randn(5, 4, 3, 2)}, uses=1).double()  # no part of the layer
    rows, columns = (3, 24) if kind == "basis" else (3, 12)
    pivots = torch.tensor([1, 4, 7]) if pivoted else None
    shape = (rows, columns - rows) if pivoted else (rows, 4, 3, 2) if kind == "basis" else (rows, 4, 3, 1)
    own = torch.randn(shape)
    if kind == "basis":
        return BasisConv(FORM, torch.randn(6, 8), bank, own, pivots=pivots)
    if kind == "spatial":
        return SpatialConv(FORM, own, torch.randn(6, 3, 1, 2), pivots=pivots)
    return HybridConv(FORM, torch.randn(6, 3 * 2 + 5), bank, own, pivots=pivots)


def factor(layer: SharedConv) -> nn.Parameter:
    name = layer.pivoted
    assert name is not None
    return getattr(layer, name)


@pytest.mark.parametrize("kind", CASES)
def test_a_mixed_factor_and_its_coefficients_are_the_same_layer(kind: str) -> None:
    layer = layer_of(kind).double()
    before, mix = layer.weight.detach(), torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)
    layer.mix_own(mix)
    with torch.no_grad():
        factor(layer).copy_(torch.linalg.solve(mix, factor(layer).flatten(1)).view_as(factor(layer)))
    torch.testing.assert_close(layer.weight, before)
    assert layer.pivoted_shape() == factor(layer).shape[1:]


@pytest.mark.parametrize("kind", ["basis", "hybrid"])
def test_a_mixed_bank_likewise(kind: str) -> None:
    layer = layer_of(kind).double()
    bank = layer.bank
    assert bank is not None
    before, mix = layer.weight.detach(), torch.randn(5, 5, dtype=torch.float64) + 4 * torch.eye(5)
    layer.mix_shared(mix)
    with torch.no_grad():
        bank.basis.copy_(torch.linalg.solve(mix, bank.basis.flatten(1)).view_as(bank.basis))  # type: ignore[operator,union-attr]
    torch.testing.assert_close(layer.weight, before)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_power_and_moments_price_small_errors_of_the_own_factor(kind: str, pivoted: bool) -> None:
    """The expected squared error of the outputs, rows weighed, when every free number of a row of the factor is off by a random
    amount: the row's power times the trace of its moments (times the columns of the window that its inputs are a mean over)."""
    layer = layer_of(kind, pivoted).double()
    x = torch.randn(400, 24, dtype=torch.float64)
    x = x @ torch.randn(24, 24, dtype=torch.float64)
    moments, weights = (x.T @ x / len(x))[None], torch.rand(6, dtype=torch.float64)
    part = layer.linear_part()
    assert part is not None
    power = layer.own_power((part[1].detach().square() * weights[:, None]).sum(0))
    priced = power * layer.own_moments(moments).diagonal(dim1=1, dim2=2).sum()

    def exact(row: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        base, number = layer.weight.detach(), factor(layer)[row].numel()
        for index in range(number):
            with torch.no_grad():
                factor(layer).view(3, -1)[row, index] += 1
                change = (layer.weight - base).flatten(1)
                factor(layer).view(3, -1)[row, index] -= 1
            total += (weights * ((change @ moments[0]) * change).sum(1)).sum()
        return total

    found = torch.stack([exact(row) for row in range(3)])
    if kind == "basis":  # the filters' inputs are the patches themselves
        torch.testing.assert_close(priced, found)
    else:  # cross terms between the columns of the window are left out: the mean over columns stands for all
        assert torch.allclose(priced, found, rtol=1.0) and float(torch.corrcoef(torch.stack([priced, found]))[0, 1]) > 0.9


def test_what_a_bank_is_worth_to_its_layers() -> None:
    weights = torch.rand(6, dtype=torch.float64)
    layer = layer_of("hybrid").double()
    shared = layer.coefficients.detach()[:, 6:]  # type: ignore[operator,union-attr,index]
    torch.testing.assert_close(layer.bank_power(weights), torch.einsum("o,or,os->rs", weights, shared, shared))
    assert not layer.turnable and not layer_of("basis").turnable  # own filters have coefficients apart
    assert BasisConv(FORM, torch.randn(6, 5), layer.bank).turnable
    tied = TiedConv(FORM, Bank({"weight": torch.randn(6, 4, 3, 2)}, uses=1), torch.tensor([1.0, 2, 3, 4, 5, 6]))
    torch.testing.assert_close(tied.bank_power(weights), weights * torch.arange(1.0, 7).double().square())


def test_free_columns_are_those_that_are_no_pivots() -> None:
    layer = layer_of("spatial", pivoted=True)
    assert layer.own_moments(torch.eye(24)[None]).shape == (1, 9, 9)
    assert free_columns(torch.tensor([1, 4, 7]), 12).tolist() == [0, 2, 3, 5, 6, 8, 9, 10, 11]
