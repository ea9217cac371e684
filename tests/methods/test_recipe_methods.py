"""The methods behind the recipes: alignment, grouped pairs, and plans that do not fit."""

from __future__ import annotations

import copy
from dataclasses import replace

import networks
import pytest
import torch
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

from sharefold.calibration.statistics import statistics_of
from sharefold.checkpoint import expand
from sharefold.convert import convert_
from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.layers import GroupedPointwise, RepeatedBlock, TiedConv
from sharefold.methods import LayerSwap, step_named
from sharefold.methods.alignment import align_groups, permute_space
from sharefold.methods.surrogate import descend, gaussian
from sharefold.models.cifar_resnet import CifarResNet
from sharefold.plans import GroupPlan, Plan
from sharefold.recipes import build_plan


class Separable(nn.Module):
    """Two pointwise layers with norms and activations of their own, MobileNetV1's way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.point = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.point(self.stem(x))).mean((2, 3)))


class Multiples(nn.Module):
    """Three blocks, whose kernels are one kernel times a number a channel, with norms of their own behind them."""

    def __init__(self, bias: bool = False, conv: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        convs = [conv(8, 8, 3, padding=1, bias=bias) for _ in range(3)]
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Sequential(conv), nn.BatchNorm2d(8), nn.ReLU()) for conv in convs])
        self.head = nn.Linear(8, 5)
        factors = torch.tensor([0.5, -1.0, 2.0, -4.0, 1.0, -0.5, 4.0, -2.0])
        with torch.no_grad():
            for k, conv in enumerate(convs):
                conv.weight.copy_(convs[0].weight * factors.roll(3 * k)[:, None, None, None])
                if isinstance(conv, ScaledStdConv2d):
                    nn.init.uniform_(conv.gain, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def trained_like(model: nn.Module, size: int = 8) -> nn.Module:
    return networks.trained_like(model, size, 64)


@torch.no_grad()
def test_permuting_a_space_changes_nothing() -> None:
    model = trained_like(CifarResNet(blocks=2), 16)
    x = torch.randn(2, 3, 16, 16)
    before, state = model(x), copy.deepcopy(model.state_dict())
    graph = analyze(model, x[:1])
    spaces = [space for space in graph.spaces.values() if space.private and space.writers and space.readers]
    assert len(spaces) >= 6
    for space in spaces:
        permute_space(model, space, torch.randperm(space.channels))
    assert torch.allclose(model(x), before, atol=1e-5)
    assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items())


@torch.no_grad()
def test_alignment_lowers_the_error_and_keeps_the_function() -> None:
    model = trained_like(networks.narrow_cifar_resnet(3), 16)
    images = torch.randn(32, 3, 16, 16)
    before = model(images[:4])
    plan = build_plan("sharesnet", model, images[:1])
    blind = [replace(group, options={"align": False}) for group in plan.groups]
    errors = []
    for groups in (blind, plan.groups):
        done = convert_(copy.deepcopy(model), replace(plan, groups=list(groups)), calibration=images, repair=False)
        errors.append([group.error for group in done.plan.groups])
    assert all(aligned < plain for plain, aligned in zip(*errors, strict=True))
    graph = analyze(model, images[:1])
    assert align_groups(model, graph, statistics_of(model, graph, images), [group.members for group in plan.groups])
    assert torch.allclose(model(images[:4]), before, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("known", [True, False])
def test_channels_whose_order_somebody_reads_are_not_aligned(known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the graph does not know it: the network that others are compared with stays the user's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.LocalResponseNorm(3, 2.0), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.norm(self.a(x).relu()))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *[Block() for _ in range(3)], nn.Flatten(2)).eval()
    if not known:
        monkeypatch.setattr("sharefold.graph.ops._CHANNELWISE_TORCH", ("activation", "normalization"))
    images = torch.randn(16, 3, 8, 8)
    before = model(images)
    plan = Plan([GroupPlan("g", "tied-kernels", ("1.a", "2.a", "3.a"), {"align": True})], 0, 0)
    done = convert_(model, plan, calibration=images, repair=False)
    assert torch.equal(done.original(images), before) and isinstance(model.get_submodule("2.a"), TiedConv)


@torch.no_grad()
def test_grouped_pair_that_exists_is_found() -> None:
    """A layer that is block diagonal, and behind it one without activation: the fit is exact."""
    model = Separable()
    for sequence, groups in ((model.point, 2), (model.last, 2)):
        weight = sequence[0].weight
        blocks = torch.ones(groups, weight.shape[0] // groups, weight.shape[1] // groups)
        weight.mul_(torch.block_diag(*blocks)[:, :, None, None])
    trained_like(model)
    images = torch.randn(64, 3, 8, 8)
    before = model(images)
    plan = build_plan("grouped-pointwise:min_channels=16", model, images[:1])
    assert [group.options["groups"] for group in plan.groups] == [2, 2]
    only = replace(plan, groups=[g for g in plan.groups if g.members == ("last.0",)])
    done = convert_(model, only, calibration=images, repair=False)
    assert done.plan.groups[0].error is not None and done.plan.groups[0].error < 1e-4
    assert torch.allclose(model(images), before, atol=2e-2 * float(before.abs().max()))


def test_grouped_pair_with_an_activation_is_fitted_by_descent() -> None:
    torch.manual_seed(1)
    model = trained_like(Separable())
    images = torch.randn(64, 3, 8, 8)
    plan = build_plan("grouped-pointwise:min_channels=16", model, images[:1])
    assert plan.groups[0].options["norm"] == "point.1" and plan.groups[0].options["act"] == "point.2"
    done = convert_(model, plan, calibration=images, repair=False)
    first = done.plan.groups[0]
    assert first.error is not None and first.error < 0.6 * first.options["fit_error_before"]
    pair = model.point[0]
    assert isinstance(pair, GroupedPointwise) and isinstance(model.point[1], nn.Identity)
    assert isinstance(pair.act, nn.ReLU) and pair.first_norm is not pair.second_norm


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "last.1"])
def test_a_grouped_pair_adds_its_offset_once_when_it_is_made_dense(bias: bool, norm: str | None) -> None:
    model = Separable()
    if bias:
        model.last[0] = nn.Conv2d(32, 16, 1)
    trained_like(model)
    images = torch.randn(48, 3, 8, 8)
    convert_(model, plan_of("grouped", ("last.0",), groups=4, second=True, norm=norm), images, repair=False)
    torch.testing.assert_close(expand(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_gaussian_has_the_moments_asked_for() -> None:
    root = torch.randn(4, 4)
    mean, covariance = torch.randn(4), root @ root.T
    samples = gaussian(mean, covariance, 50_000).flatten(1)
    assert torch.allclose(samples.mean(0), mean, atol=0.05 * float(covariance.diagonal().max()))
    assert torch.allclose(samples.T.cov(), covariance, atol=0.05 * float(covariance.abs().max()))


def test_descent_keeps_a_start_that_is_best() -> None:
    target = nn.Conv2d(3, 2, 1)
    module = copy.deepcopy(target)
    start, end = descend(module, target, torch.randn(64, 3, 1, 1), steps=5)
    assert start == end == 0.0
    assert torch.equal(module.weight, target.weight)


def plan_of(method: str, members: tuple[str, ...], **options: object) -> Plan:
    return Plan([GroupPlan("g", method, members, dict(options))], 0, 0)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of("grouped", ("point.0", "last.0"), groups=2), "one layer a group"),
        (plan_of("grouped", ("point.0",), groups=5), "does not divide"),
        (plan_of("grouped", ("stem.0",), groups=1), "no plain ungrouped 1x1"),
        (plan_of("grouped", ("point.0",), groups=2, second=True, norm="nowhere"), "is no module"),
        (plan_of("reuse", ("point", "last")), "differ in structure"),
        (plan_of("tied-kernels", ("point.0", "last.0")), "must be isomorphic"),
        (plan_of("tied-kernels", ("point.0",), bias="none"), "do not fit"),
        (plan_of("filter-bases", ("point.0",), shared=0, unique=0), "do not fit"),
        (plan_of("filter-bases", ("head",), shared=1, unique=0), "ungrouped convolution"),
    ],
)
def test_plans_that_do_not_fit(plan: Plan, message: str) -> None:
    model = Separable()
    with pytest.raises(SharefoldError, match=message):
        convert_(model, plan, calibration=torch.randn(8, 3, 8, 8))
    assert isinstance(model.point[0], nn.Conv2d)


@pytest.mark.parametrize("conv", [StdConv2d, ScaledStdConv2d])
def test_filter_bases_refuse_weights_that_are_standardised(conv: type[nn.Conv2d]) -> None:
    """While it trains, the layer runs its filters by themselves, and there is no weight to standardise."""
    with pytest.raises(SharefoldError, match=r"blocks\.0\.0\.0 standardises its weight.*leave it out"):
        plan = plan_of("filter-bases", ("blocks.0.0.0", "blocks.1.0.0"), shared=4, unique=1)
        convert_(Multiples(conv=conv), plan, torch.randn(8, 3, 8, 8))


def test_steps_on_blocks_and_pairs_are_no_swaps_of_layers() -> None:
    """They have nothing that solves or builds single layers, so that nothing can call it in vain."""
    for name in ("reuse", "grouped"):
        step = step_named(name)
        assert not isinstance(step, LayerSwap) and not any(hasattr(step, part) for part in ("solve", "blank", "member"))
    assert isinstance(step_named("filter-bases"), LayerSwap) and not hasattr(step_named("filter-bases"), "candidates")


def test_tied_kernels_leave_nothing_but_the_kernel() -> None:
    model = trained_like(networks.narrow_cifar_resnet(3), 16)
    images = torch.randn(16, 3, 16, 16)
    convert_(model, build_plan("sharesnet", model, images[:1]), calibration=images)
    layers = [layer for layer in model.modules() if isinstance(layer, TiedConv)]
    assert len(layers) == 9 and not any(True for layer in layers for _ in layer.parameters(recurse=False))


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("conv", [nn.Conv2d, StdConv2d, ScaledStdConv2d])
def test_a_scale_that_goes_into_the_norm_leaves_the_bias(bias: bool, conv: type[nn.Conv2d]) -> None:
    """Kernels are exact multiples of one another, so that tying them loses nothing."""
    model, images = trained_like(Multiples(bias, conv)), torch.randn(48, 3, 8, 8)
    before = model(images)
    convert_(model, plan_of("tied-kernels", tuple(f"blocks.{k}.0.0" for k in range(3)), align=False), images, repair=False)
    assert isinstance(model.blocks[0][0][0], TiedConv)
    torch.testing.assert_close(model(images), before, rtol=2e-3, atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize(("conv", "whole"), [(nn.Conv2d, True), (nn.Conv2d, False), (StdConv2d, False), (ScaledStdConv2d, False)])
def test_reused_blocks_keep_their_scales_signs_and_gains_in_their_norms(conv: type[nn.Conv2d], whole: bool) -> None:
    model, images = Multiples(conv=conv), torch.randn(48, 3, 8, 8)
    for k, factor in enumerate((1.0, -2.0, 4.0) if whole else ()):  # so that errors are 0 to the last bit
        model.blocks[k][0][0].weight.copy_(factor * model.blocks[0][0][0].weight)
    before = trained_like(model)(images)
    convert_(model, plan_of("reuse", tuple(f"blocks.{k}" for k in range(3)), align=False), images, repair=False)
    assert isinstance(model.blocks[0], RepeatedBlock)
    torch.testing.assert_close(model(images), before, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_scales_count_for_reuse_only_where_a_norm_in_the_block_takes_them() -> None:
    model, images = trained_like(Multiples()), torch.randn(48, 3, 8, 8)
    members = tuple(f"blocks.{k}.0" for k in range(3))  # without the norms
    done = convert_(copy.deepcopy(model), plan_of("reuse", members, align=False), images, repair=False)
    assert done.plan.groups[0].error is not None and done.plan.groups[0].error > 0.1
