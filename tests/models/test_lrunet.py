"""LruNet: the shuffle, the iteration rule, exact repeating and unrolling."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.models.lrunet import LruBlock, LruNet, Shuffle, Unshuffle, repeat_lrunet, unroll_lrunet


def randomised(model: nn.Module) -> nn.Module:
    """Weights and statistics such that no BatchNorm is trivial and no logit is cut off."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + low)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    nn.init.constant_(model.get_classifier().bias, 100.0)
    return model.eval()


@pytest.mark.parametrize("chans", [4, 6, 64])
def test_shuffle_is_swap_then_channel_shuffle(chans: int) -> None:
    x = torch.randn(2, chans, 3, 3)
    swapped = torch.cat((x[:, chans // 2 :], x[:, : chans // 2]), dim=1)
    assert torch.equal(Shuffle()(x), F.channel_shuffle(swapped, 2))
    assert torch.equal(Unshuffle()(Shuffle()(x)), x)
    assert not torch.equal(Shuffle()(x), x)


@pytest.mark.parametrize(("reuse", "width"), [(1, 1), (3, 1), (2, 2)])
def test_unrolling_and_repeating_are_bit_identical(reuse: int, width: int) -> None:
    model = randomised(timm.create_model("lrunet", reuse=reuse, width=width, num_classes=5))
    twin = unroll_lrunet(model)
    back = repeat_lrunet(twin)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0.1
        assert torch.equal(twin(x), expected)
        assert torch.equal(back(x), expected)
    before, after = model.state_dict(), back.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert back.pretrained_cfg == model.pretrained_cfg
    assert not twin.training and not back.training
    twin.stage1.blocks[0].dw.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(model(x), expected), "the twin must not share storage with the original"


def test_unrolled_convolutions_are_independent_tensors() -> None:
    twin = unroll_lrunet(timm.create_model("lrunet", reuse=4))
    pointers = {block.dw.weight.data_ptr() for block in twin.stage2.blocks}
    assert len(pointers) == 4
    assert all(isinstance(block, LruBlock) for block in twin.stage2.blocks)


def test_repeating_unequal_blocks_is_refused() -> None:
    model = timm.create_model("lrunet_unrolled", reuse=2)
    with pytest.raises(SharefoldError, match=r"stage1\.blocks\.1\.dw"):
        repeat_lrunet(model)


@pytest.mark.parametrize("kwargs", [{"width": 3}, {"reuse": 0}])
def test_impossible_arguments(kwargs: dict[str, int]) -> None:
    with pytest.raises(SharefoldError, match="give"):
        LruNet(**kwargs)


def test_pooling_is_fixed() -> None:
    with pytest.raises(SharefoldError, match="global_pool"):
        timm.create_model("lrunet", reuse=1).reset_classifier(10, "max")


@pytest.mark.parametrize("size", [28, 32, 64])
def test_sizes(size: int) -> None:
    """28 is Fashion-MNIST's raw size (14, 7, 4, 4, 2); logits are non-negative."""
    model = randomised(timm.create_model("lrunet", reuse=2, in_chans=1))
    with torch.no_grad():
        out = model(torch.rand(1, 1, size, size))
    assert out.shape == (1, 10) and (out >= 0).all()
