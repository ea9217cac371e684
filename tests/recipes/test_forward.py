"""Converted networks against the published ones, written down independently in references.py."""

from __future__ import annotations

import pytest
import references as ref
import torch
from nets import NarrowResNet, build, close, converted, randomise, settled
from timm.models import efficientnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from sharefold.layers import BasisConv, GroupedPointwise, banks
from sharefold.models.cifar_resnet import CifarResNet
from sharefold.models.lrunet import LruNet, LruNetUnrolled
from sharefold.models.preact_resnet import PreActBasic, PreActBottleneck, PreActResNet
from sharefold.models.se_resnet_cifar import SeResNet


def shared_kernels(model: nn.Module, entry: str = "weight") -> list[Tensor]:
    """The banks' kernels in the order of the groups, hence of the stages."""
    return [getattr(bank, entry).detach() for bank in banks(model).values()]


def narrow_se_resnet() -> SeResNet:
    """Two blocks a stage of 24, 32 and 48 channels instead of 64, 128 and 256."""
    model = SeResNet(blocks=2)
    model.layer1, model.layer2, model.layer3 = (
        SeResNet._stage(i, o, 2, s) for i, o, s in ((16, 24, 1), (24, 32, 2), (32, 48, 2))
    )
    model.fc = nn.Linear(48, 10)
    return model


def narrow_efficientnet() -> nn.Module:
    """EfficientNet-B0 of three tenths of the width and of the depth."""
    return efficientnet._gen_efficientnet("efficientnet_b0", channel_multiplier=0.3, depth_multiplier=0.3, num_classes=10)


def by_stage(kernels: list[Tensor], first: int = 1) -> dict[int, Tensor]:
    return dict(enumerate(kernels, start=first))


@torch.no_grad()
def test_sharesnet_basic() -> None:
    model = randomise(NarrowResNet(BasicBlock))
    converted(model, "sharesnet", 64)
    x = torch.randn(2, 3, 64, 64)
    assert close(model(x), ref.sharesnet_basic(x, model.state_dict(), by_stage(shared_kernels(model))))


@torch.no_grad()
def test_sharesnet_bottleneck() -> None:
    model = randomise(NarrowResNet(Bottleneck))
    converted(model, "sharesnet", 64, images=4)
    x = torch.randn(2, 3, 64, 64)
    assert close(model(x), ref.sharesnet_bottleneck(x, model.state_dict(), by_stage(shared_kernels(model))))


@torch.no_grad()
@pytest.mark.parametrize("block", [PreActBasic, PreActBottleneck])
def test_sharesnet_preactivation(block: type) -> None:
    model = randomise(PreActResNet(block, blocks=3, widths=(24, 32, 64)))
    converted(model, "sharesnet", 16)
    x = torch.randn(2, 3, 16, 16)
    assert close(model(x), ref.sharesnet_preact(x, model.state_dict(), by_stage(shared_kernels(model))))


@torch.no_grad()
def test_kernel_sharing_convmixer() -> None:
    from timm.models.convmixer import ConvMixer

    model = randomise(ConvMixer(dim=12, depth=4, kernel_size=5, patch_size=1, num_classes=10))
    converted(model, "kernel-sharing", 8)
    (dw, pw), (dw_bias, pw_bias) = shared_kernels(model), shared_kernels(model, "bias")
    x = torch.randn(2, 3, 8, 8)
    assert close(model(x), ref.kernel_sharing_convmixer(x, model.state_dict(), dw, dw_bias, pw, pw_bias))


@torch.no_grad()
@pytest.mark.parametrize("stages", ["all", "2+3"])
def test_kernel_sharing_se_resnet(stages: str) -> None:
    model = randomise(narrow_se_resnet())
    converted(model, f"kernel-sharing:stages={stages}", 16, images=4)
    kernels = by_stage(shared_kernels(model), 1 if stages == "all" else 2)
    x = torch.randn(2, 3, 16, 16)
    assert close(model(x), ref.kernel_sharing_se_resnet(x, model.state_dict(), kernels))


def members(model: nn.Module) -> dict[str, ref.BasisMember]:
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BasisConv):
            norm = layer.norm
            assert norm is not None
            entries = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            own = layer.unique
            if own is None:
                own = torch.zeros(0, *layer.form.weight_shape[1:])
            found[name] = ref.BasisMember(own, ref.BatchNorm(*entries, norm.eps), layer.coefficients[:, :, None, None])
    return found


@torch.no_grad()
@pytest.mark.parametrize("options", ["shared=4,unique=1,bases=1", "shared=4,unique=2,bases=2", "shared=5,unique=0"])
@pytest.mark.parametrize("scramble", [False, True])
def test_filter_bases(options: str, scramble: bool) -> None:
    model = randomise(CifarResNet(blocks=3))
    converted(model, f"filter-bases:{options}", 16)
    if scramble:  # also where the new norms are no identity any more
        for layer in model.modules():
            if isinstance(layer, BasisConv):
                randomise(nn.Sequential(layer.norm))
    kernels = shared_kernels(model, "basis")
    double = "bases=2" in options
    step = 2 if double else 1
    bases = {stage: tuple(kernels[(stage - 1) * step : stage * step]) for stage in (1, 2, 3)}
    x = torch.randn(2, 3, 16, 16)
    expected = ref.filter_bases(x, model.state_dict(), bases, members(model))
    assert close(model(x), expected)
    for layer in model.modules():
        if isinstance(layer, BasisConv):
            layer.runtime = "factored"
    assert close(model(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["3x3", "3x3+expand"])
def test_filter_bases_bottleneck(rule: str) -> None:
    model = randomise(NarrowResNet(Bottleneck))
    converted(model, f"filter-bases:tie={rule}", 64, images=4)
    kernels = shared_kernels(model)
    expand = by_stage(kernels[4:]) if "expand" in rule else None
    x = torch.randn(2, 3, 64, 64)
    assert close(model(x), ref.filter_bases_bottleneck(x, model.state_dict(), by_stage(kernels[:4]), expand))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["expand", "expand+project"])
def test_filter_bases_mobilenet(rule: str) -> None:
    model = randomise(build("tv:mobilenet_v2", width_mult=0.25))
    converted(model, f"filter-bases:tie={rule}", 64, images=4)
    kernels = shared_kernels(model)
    project = by_stage(kernels[4:], 3) if "project" in rule else None
    x = torch.randn(2, 3, 64, 64)
    assert close(model(x), ref.filter_bases_mobilenet_v2(x, model.state_dict(), by_stage(kernels[:4], 3), project))


@torch.no_grad()
@pytest.mark.parametrize("width", [1, 2])
def test_layer_reuse(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharefold.models.lrunet.STEM", 32)
    reuse = 4 - width
    model = randomise(LruNetUnrolled(reuse=reuse, width=width))
    nn.init.constant_(model.get_classifier().bias, 5.0)  # the logits pass a ReLU
    converted(model, "layer-reuse", 32, images=2)
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("blocks.0.block.", "")
        for norm in ("dw_bn", "pw_bn"):
            name = name.replace(f"{norm}.", f"{norm}_list.")
        state[name] = value
    assert set(state) == set(LruNet(reuse=reuse, width=width).state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert close(model(x), ref.lrunet(x, state, width))


def norm_of(norm: nn.Module | None) -> ref.BatchNorm | None:
    return (
        None if norm is None else ref.BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    )


@torch.no_grad()
def test_grouped_pointwise_efficientnet() -> None:
    model = settled(narrow_efficientnet(), 48)
    expected = {
        name: ref.keffnet_groups(layer.in_channels, layer.out_channels, 16)
        for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)
    }  # fmt: skip
    converted(model, "grouped-pointwise:min_channels=16", 48, images=4)
    pairs = {
        name: ref.Pair(
            layer.groups, layer.first.weight, layer.first.bias, norm_of(layer.first_norm),
            *((None, None, None) if layer.second is None else
              (layer.second.weight, layer.second.bias, norm_of(layer.second_norm))),
        )
        for name, layer in model.named_modules() if isinstance(layer, GroupedPointwise)
    }  # fmt: skip
    assert {name: pair.groups for name, pair in pairs.items()} == {n: g for n, g in expected.items() if g > 1}
    x = torch.randn(2, 3, 48, 48)
    assert close(model(x), ref.keffnet(x, model.state_dict(), pairs), rtol=1e-3)
