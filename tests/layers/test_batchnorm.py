"""What a BatchNorm amounts to, and scales and shifts moved into it."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from sharefold.layers import BasisConv, absorb_scale, affine, form_of, shift_output, takes_scale


def norm(channels: int = 5) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
        nn.init.uniform_(tensor, 0.2, 2.0)
    return module.eval()


def by_hand(module: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The definition, in float64."""
    mean, variance = (t.double()[:, None, None] for t in (module.running_mean, module.running_var))
    y = (x.double() - mean) / (variance + module.eps).sqrt()
    weight, bias = module.weight, module.bias
    y = y if weight is None else y * weight.double()[:, None, None]
    return y if bias is None else y + bias.double()[:, None, None]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plain", "no affine", "no bias", "large eps", "with an activation"])
def test_affine_is_the_norm_in_eval_mode(kind: str) -> None:
    module = norm()
    if kind == "no affine":
        module = nn.BatchNorm2d(5, affine=False).eval()
        module.running_mean.uniform_(-2, 2), module.running_var.uniform_(0.2, 2)
    elif kind == "no bias":
        module.bias = None
    elif kind == "large eps":
        module.eps = 0.5
    elif kind == "with an activation":
        twin, module = module, BatchNormAct2d(5, apply_act=False).eval()
        module.load_state_dict(twin.state_dict())
    x = torch.randn(6, 5, 3, 3)
    scale, shift = affine(module)
    assert scale.shape == shift.shape == (5,)
    found = scale[:, None, None] * x + shift[:, None, None]
    torch.testing.assert_close(found, by_hand(module, x).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, module(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_shift_in_front_of_a_norm_goes_into_its_mean() -> None:
    module, before, shift = norm(), norm(), torch.tensor([0.5, -2.0, 0.0, 30.0, 1e-3])
    before.load_state_dict(module.state_dict())
    shift_output(module, shift.double())
    x = torch.randn(6, 5, 3, 3)
    torch.testing.assert_close(module(x).double(), by_hand(before, x + shift[:, None, None]), rtol=1e-5, atol=1e-4)
    changed = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])]
    assert changed == ["running_mean"] and module.running_mean.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("kind", ["conv", "linear", "shared"])
def test_a_shift_of_a_layer_goes_into_its_bias(kind: str) -> None:
    shift = torch.linspace(-1, 2, 5)
    dense = nn.Linear(4, 5) if kind == "linear" else nn.Conv2d(4, 5, 3)
    form = form_of(dense)
    assert form is not None
    layer = BasisConv(form, torch.randn(5, 6), unique=torch.randn(6, 4, 3, 3), bias=dense.bias) if kind == "shared" else dense
    x = torch.randn(2, 4) if kind == "linear" else torch.randn(2, 4, 5, 5)
    before = copy.deepcopy(layer)(x)
    shift_output(layer, shift.double())
    torch.testing.assert_close(layer(x) - before, (shift if kind == "linear" else shift[:, None, None]).expand_as(before))


@torch.no_grad()
def test_a_scale_and_its_inverse_undo_each_other() -> None:
    module, before, scale = norm(), norm(), torch.tensor([0.5, -2.0, 1.0, 3.0, -0.1])
    before.load_state_dict(module.state_dict())
    absorb_scale(module, scale)
    x = torch.randn(6, 5, 3, 3)
    torch.testing.assert_close(module(x).double(), by_hand(before, scale[:, None, None] * x), rtol=1e-4, atol=1e-4)
    absorb_scale(module, 1 / scale)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_eval_and_train_mode_keep_their_function() -> None:
    scale = torch.tensor([0.5, -2.0, 1.0, 30.0, -0.01])
    x = torch.randn(64, 5, 4, 4)
    before, after = norm(), norm()
    after.load_state_dict(before.state_dict())
    absorb_scale(after, scale)
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
    taken = absorb_scale(module, scale)
    assert torch.equal(taken[1:], scale[1:]) and 0 < float(taken[0]) < 1e-3
    assert all(torch.isfinite(t).all() for t in module.state_dict().values())
    x = torch.randn(4, 3, 2, 2)
    assert torch.allclose(module(x)[:, 0], before(0 * x)[:, 0], atol=1e-3)
    assert torch.allclose(module(x)[:, 1:], before(scale[:, None, None] * x)[:, 1:], rtol=1e-3)


def test_who_takes_a_scale() -> None:
    assert takes_scale(nn.BatchNorm2d(3))
    assert not takes_scale(nn.BatchNorm2d(3, affine=False))
    assert not takes_scale(nn.BatchNorm2d(3, track_running_stats=False))
    assert not takes_scale(nn.GroupNorm(1, 3))
