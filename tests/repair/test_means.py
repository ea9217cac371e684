"""Converted layers keep their mean outputs, through a bias or the norm behind them."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import sharefold
from sharefold.plans import GroupPlan, Plan


@torch.no_grad()
@pytest.mark.parametrize("conv", [nn.Conv2d, StdConv2d, ScaledStdConv2d])
def test_mean_outputs_stay_whatever_the_kind_of_convolution(conv: type[nn.Conv2d]) -> None:
    layer = conv(3, 16, 3, padding=0, bias=True)
    if isinstance(layer, ScaledStdConv2d):
        nn.init.uniform_(layer.gain, 0.5, 3.0)
    original = nn.Sequential(layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    model, images = copy.deepcopy(original), torch.randn(64, 3, 10, 10) + torch.tensor([3.0, 0.0, -2.0])[:, None, None]
    cal = sharefold.calibrate(original, images)
    plan = Plan([GroupPlan("g", "svd", ("0",), {"rank": 3})], 0, 0)
    sharefold.convert_(model, plan, cal, repair=False)
    wanted, found = original[0](cal.fit_images), model[0](cal.fit_images)
    spread = wanted.std((0, 2, 3))
    assert float(((found - wanted).square().mean((0, 2, 3)).sqrt() / spread).mean()) > 0.1  # what is lost is much
    assert float(((found - wanted).mean((0, 2, 3)).abs() / spread).max()) < 0.01
