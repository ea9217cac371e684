"""Shared filters and a layer's own column filters in one layer: against the weight written out, in both run-time forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharefold.layers import Bank, HybridConv, form_of, free_columns, with_pivots
from sharefold.measure import count_macs

VARIANTS = {
    "plain": {"padding": 1},
    "stride and dilation": {"stride": (2, 3), "dilation": (2, 1), "padding": (2, 1)},
    "groups": {"padding": 1, "groups": 2},
    "depthwise": {"padding": 1, "groups": 8},
}


def hybrid(conv: nn.Conv2d, own: int = 2, shared: int = 4, wider: int = 0) -> HybridConv:
    form = form_of(conv)
    assert form is not None
    channels, height, width = form.weight_shape[1:]
    bank = Bank({"basis": torch.randn(shared, channels + wider, height, width)}, uses=1)
    coefficients = torch.randn(form.out_channels, own * width + shared)
    return HybridConv(form, coefficients, bank, torch.randn(own, channels, height, 1), bias=conv.bias)


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("kernel", [(3, 3), (2, 5)])
def test_both_forms_compute_the_weight_that_the_formula_says(variant: str, kernel: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = hybrid(nn.Conv2d(8, 16, kernel, **VARIANTS[variant]), wider=3)  # type: ignore[arg-type]
    channels, _, width = layer.form.weight_shape[1:]
    expected = torch.zeros(layer.form.weight_shape)
    for o in range(16):
        for b in range(width):
            for j in range(2):
                expected[o, :, :, b] += (layer.coefficients[o, j * width + b] * layer.vertical[j, :, :, 0]).detach()
        for s in range(4):
            expected[o] += (layer.coefficients[o, 2 * width + s] * layer.bank.basis[s, :channels]).detach()  # type: ignore[union-attr,index]
    torch.testing.assert_close(layer.compose(), expected, rtol=1e-4, atol=1e-5)
    filters, coefficients = layer.linear_part()  # type: ignore[misc]
    torch.testing.assert_close((coefficients @ filters.flatten(1)).view_as(expected), expected, rtol=1e-4, atol=1e-5)
    x = torch.randn(2, 8, 11, 9)
    wanted = layer.form.apply(x, expected, layer.bias)
    for runtime in ("composed", "factored"):
        layer.runtime = runtime
        for mode in (True, False):
            torch.testing.assert_close(layer.train(mode)(x), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.dense()(x), wanted, rtol=1e-4, atol=1e-4)


def test_its_share_of_multiplications_is_what_is_counted() -> None:
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    layer, x = hybrid(conv), torch.randn(1, 8, 12, 12)
    layer.runtime = "factored"
    # Maps of 12 x 12 with padding 1: the column filters' outputs are as large as the layer's own.
    assert count_macs(layer.eval(), x) / count_macs(conv, x) == pytest.approx(layer.factored_share())
    assert layer.factored_share() == pytest.approx((4 * (72 + 16) + 2 * (24 + 48)) / (16 * 72))


@pytest.mark.parametrize("odd", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_paddings_that_cannot_be_split_run_composed(odd: dict[str, object]) -> None:
    layer = hybrid(nn.Conv2d(8, 16, 3, **odd))  # type: ignore[arg-type]
    layer.runtime = "factored"
    assert layer.factored_share() == float("inf") and not layer.runs_factored()
    assert layer(torch.randn(1, 8, 6, 6)).shape == (1, 16, 6, 6)


def test_pivots_and_gradients() -> None:
    torch.manual_seed(1)
    plain = hybrid(nn.Conv2d(8, 16, 3, padding=1))
    pivots = torch.tensor([3, 17]).int()
    free = torch.randn(2, 22)
    plain.vertical.data.copy_(with_pivots(free, pivots).reshape(2, 8, 3, 1))
    layer = HybridConv(plain.form, plain.coefficients.detach(), plain.bank, free, plain.own_bias, pivots=pivots)  # type: ignore[arg-type]
    assert plain.vertical.numel() - layer.vertical.numel() == 4 and layer.pointers() == {"pivots": 24}
    assert len(free_columns(pivots, 24)) == 22
    x = torch.randn(2, 8, 6, 6)
    for runtime in ("composed", "factored"):
        layer.runtime = plain.runtime = runtime
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    layer(x).square().sum().backward()
    for parameter in (layer.vertical, layer.coefficients, layer.bank.basis):  # type: ignore[union-attr]
        assert bool((parameter.grad != 0).any())  # type: ignore[union-attr]
