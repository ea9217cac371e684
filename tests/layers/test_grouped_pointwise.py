"""The grouped pair: interleaving, and the dense layer that it is in eval mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharefold.layers import GroupedPointwise, form_of
from sharefold.layers.grouped_conv import interleave


def test_interleave_takes_one_channel_of_every_group_in_turn() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert interleave(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert interleave(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def pair(second: bool, shuffle: bool, bias: bool, norms: bool, act: nn.Module | None = None) -> GroupedPointwise:
    form = form_of(nn.Conv2d(12, 6, 1, stride=2))
    assert form is not None
    made = [nn.BatchNorm2d(6) if norms else None for _ in range(2)]
    module = GroupedPointwise(
        form, 3, bias=bias, second=second, shuffle=shuffle, norm=made[0], first_norm=made[1], act=act
    )
    for norm in made:
        if norm is not None:
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_affine_form(second: bool, shuffle: bool, bias: bool, norms: bool) -> None:
    module = pair(second, shuffle, bias, norms and second)
    affine = module.affine()
    assert affine is not None
    weight, offset = affine
    x = torch.randn(2, 12, 4, 4)
    expected = nn.functional.conv2d(x, weight[:, :, None, None], offset, stride=2)
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_an_activation_in_between_has_no_dense_twin() -> None:
    assert pair(True, True, False, True, act=nn.ReLU()).affine() is None
