"""One bank for layers of different widths, where a layer may have fewer inputs than the bank has filters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sharefold
from sharefold.graph import analyze
from sharefold.layers import form_of
from sharefold.measure import agreement
from sharefold.methods import method_named
from sharefold.plans import GroupPlan, Plan

WIDTHS = (4, 48, 8, 64, 24)


class Widths(nn.Module):
    """1x1 convolutions of one stage, no two of them alike; narrow ones come first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = zip(WIDTHS, WIDTHS[1:], strict=False)
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1)
        layers = [nn.Sequential(nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Linear(WIDTHS[-1], 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


IMAGES = torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["auto", "basis", "hybrid"])
@pytest.mark.parametrize("budget", ["70%", "90% MACs", "100% latency"])
def test_every_budget_can_price_it(budget: str, method: str) -> None:
    model = Widths().eval()
    before = sum(p.numel() for p in model.parameters())
    plan = sharefold.plan(model, budget=budget, calibration=IMAGES, method=method)
    sharefold.convert_(model, plan, calibration=IMAGES, config={"base": None})
    assert sum(p.numel() for p in model.parameters()) == plan.params_after <= before
    assert budget != "70%" or plan.params_after <= 0.7 * before


@pytest.mark.parametrize("rank", [2, 20, 40])
def test_a_narrow_layer_stands_in_for_itself(rank: int) -> None:
    basis, forms = method_named("basis"), [form_of(layer[0]) for layer in Widths().body]
    options = {"rank": rank, "pivoted": True}
    for form in forms:
        layer = basis.stand_in(form, options)
        assert layer.coefficients.shape == (form.out_channels, rank)
    assert basis.fits(forms, options)
    widest = max(form.features for form in forms)
    rows = sum(form.out_channels for form in forms)
    # The places of pivots are integers, which are priced but no parameters.
    assert basis.cost(forms, options) == basis.price(rank, rows, widest) - rank


def test_the_same_network_whatever_the_widths() -> None:
    model = Widths().eval()
    names = tuple(f"body.{i}.0" for i in range(len(WIDTHS) - 1))
    assert set(names) <= set(analyze(model, IMAGES[:1]).layers)
    plan = Plan([GroupPlan("widths", "basis", names, {"rank": 47, "pivoted": True})], 0, 0)
    done = sharefold.convert_(model, plan, calibration=IMAGES, repair=False, config={"base": None})
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), sharefold.expand(model)(IMAGES), rtol=1e-4, atol=1e-4)
    assert agreement(done.original, model, IMAGES).kl < 1e-3
