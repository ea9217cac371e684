"""A scale moved into a BatchNorm."""

from __future__ import annotations

import torch
from torch import nn

from sharefold.layers import fold_scale, takes_scale


def norm(channels: int = 5) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        nn.init.uniform_(tensor, 0.2, 2.0)
    return module.eval()


@torch.no_grad()
def test_eval_and_train_mode_keep_their_function() -> None:
    scale = torch.tensor([0.5, -2.0, 1.0, 30.0, -0.01])
    x = torch.randn(64, 5, 4, 4)
    before, after = norm(), norm()
    after.load_state_dict(before.state_dict())
    fold_scale(after, scale)
    scaled = scale[:, None, None] * x
    assert torch.allclose(after(x), before(scaled), atol=1e-4)
    assert torch.allclose(after.weight.abs(), before.weight.abs(), rtol=1e-3)  # only the sign goes to the weight
    difference = after.train()(x) - before.train()(scaled)
    assert float(difference[:, :4].abs().max()) < 1e-3  # a variance of 1e-4 feels eps


@torch.no_grad()
def test_huge_and_zero_scales_stay_finite() -> None:
    module, before = norm(3), norm(3)
    before.load_state_dict(module.state_dict())
    scale = torch.tensor([0.0, 1e6, -1e6])
    fold_scale(module, scale)
    assert all(torch.isfinite(t).all() for t in module.state_dict().values())
    x = torch.randn(4, 3, 2, 2)
    assert torch.allclose(module(x)[:, 0], before(0 * x)[:, 0], atol=1e-3)
    assert torch.allclose(module(x)[:, 1:], before(scale[:, None, None] * x)[:, 1:], rtol=1e-3)


def test_who_takes_a_scale() -> None:
    assert takes_scale(nn.BatchNorm2d(3))
    assert not takes_scale(nn.BatchNorm2d(3, affine=False))
    assert not takes_scale(nn.BatchNorm2d(3, track_running_stats=False))
    assert not takes_scale(nn.GroupNorm(1, 3))
