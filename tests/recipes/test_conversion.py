"""Converted networks carry their weights along, save, load, expand and train."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from nets import CASES, close, converted, randomise, small_converted
from networks import count, narrow_cifar_resnet
from torch import fx, nn

from sharefold.checkpoint import expand, load, save
from sharefold.errors import SharefoldError
from sharefold.layers import banks, repeat_blocks, shared_layers
from sharefold.models.cifar_resnet import CifarResNet
from sharefold.models.lrunet import LruNet, LruNetUnrolled, unroll_lrunet
from sharefold.store import quantize_


@pytest.mark.parametrize("recipe", CASES)
def test_save_load_train(recipe: str, tmp_path: Path) -> None:
    dense, model, plan, done, size = small_converted(recipe)
    assert count(model) == plan.params_after == done.plan.params_after < count(dense)
    x = torch.randn(16, 3, size, size)
    with torch.no_grad():
        before = model(x)
    save(model, tmp_path / "saved")
    again = load(tmp_path / "saved", model=dense)
    assert count(again) == count(model)
    with torch.no_grad():
        assert torch.equal(again(x), before)
        assert torch.equal(copy.deepcopy(model)(x), before)

    again.train()
    labels = torch.arange(16) % 10
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-5)
    loss = nn.functional.cross_entropy(again(x), labels)
    loss.backward()
    missing = [name for name, p in again.named_parameters() if p.grad is None]
    assert not missing
    assert all(float(p.grad.abs().sum()) > 0 for bank in banks(again).values() for p in bank.parameters())
    optimizer.step()
    assert nn.functional.cross_entropy(again(x), labels) < loss


NO_TWIN = "grouped-pointwise:min_channels=8"


def test_pairs_with_a_norm_between_have_no_dense_twin() -> None:
    _, model, *_ = small_converted(NO_TWIN)
    with pytest.raises(SharefoldError, match="no dense twin"):
        expand(model)


@pytest.mark.parametrize("recipe", [case for case in CASES if case != NO_TWIN])
def test_expand(recipe: str) -> None:
    dense, model, *_, size = small_converted(recipe)
    twin = expand(model)
    assert {name: p.shape for name, p in twin.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert list(twin.state_dict()) == list(dense.state_dict())
    assert not shared_layers(twin) and not banks(twin)
    with torch.no_grad():
        x = torch.randn(3, 3, size, size)
        assert close(twin(x), model(x))


@pytest.mark.parametrize("recipe", ["sharesnet", "kernel-sharing", "filter-bases:tie=3x3"])
def test_equal_kernels_are_kept_exactly(recipe: str) -> None:
    model = randomise(narrow_cifar_resnet(blocks=3))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            for conv in (block.conv1, block.conv2):
                if conv.weight.shape == stage[1].conv1.weight.shape:
                    conv.weight.data.copy_(stage[1].conv1.weight)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        converted(model, recipe, 16)
        assert torch.equal(model(x), before)


def test_scaled_kernels_are_tied_exactly() -> None:
    """Kernels that differ by a factor per output channel: the factors end up in the BatchNorms."""
    model = randomise(narrow_cifar_resnet(blocks=3))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            factor = torch.rand(stage[0].conv2.weight.shape[0], 1, 1, 1) + 0.5
            block.conv2.weight.data.copy_(stage[0].conv2.weight * factor)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        _, done = converted(model, "sharesnet", 16, images=64)
        assert max(group.error for group in done.plan.groups) < 1e-6
        assert close(model(x), before, rtol=1e-3)
        model.train()
        first = model(x)  # the BatchNorms fit their inputs in train mode, too
    assert torch.isfinite(first).all()


def test_alignment_finds_permuted_kernels() -> None:
    """Blocks that are the same up to the order of their inner channels: tying them is exact."""
    model = randomise(narrow_cifar_resnet(blocks=4))
    for stage in (model.layer1, model.layer2, model.layer3):
        reference = stage[1]
        for block in list(stage)[1:]:
            order = torch.randperm(block.conv1.out_channels)
            block.conv1.weight.data.copy_(torch.randn_like(block.conv1.weight) * 0.1)
            block.conv2.weight.data.copy_(reference.conv2.weight[:, order] if block is not reference else block.conv2.weight)
    with torch.no_grad():
        x = torch.randn(3, 3, 16, 16)
        before = model(x)
        _, done = converted(model, "filter-bases:tie=3x3", 16, images=32)
        blind = {group.name: group.error for group in done.plan.groups}
        assert max(error for name, error in blind.items() if "conv2" in name) < 1e-6
        assert torch.isfinite(model(x)).all() and before.shape == (3, 10)


@torch.no_grad()
def test_unroll_then_repeat_is_bit_identical() -> None:
    shared = LruNet(reuse=4)
    randomise(shared)
    nn.init.constant_(shared.get_classifier().bias, 5.0)
    model = unroll_lrunet(shared).eval()
    x = torch.rand(4, 3, 32, 32)
    plan, _ = converted(model, "layer-reuse", 32, repair=True)
    assert torch.equal(model(x), shared(x)) and shared(x).std() > 0
    assert count(model) == count(shared) == plan.params_after


@torch.no_grad()
def test_repeated_blocks_run_and_unroll_the_same() -> None:
    blocks = [block for block in randomise(LruNetUnrolled(reuse=3)).stage1.blocks]
    for block in blocks[1:]:
        block.dw.load_state_dict(blocks[0].dw.state_dict())
        block.pw.load_state_dict(blocks[0].pw.state_dict())
    x = torch.randn(2, 64, 8, 8)
    expected = nn.Sequential(*copy.deepcopy(blocks))(x)
    repeated = nn.Sequential(*repeat_blocks(blocks))
    assert torch.equal(repeated(x), expected)
    assert torch.equal(nn.Sequential(*repeated[0].unrolled())(x), expected)
    twin = copy.deepcopy(repeated)
    twin[0].block.dw.weight.mul_(0)
    assert torch.equal(repeated(x), expected) and not torch.equal(twin(x), expected)
    assert sum(name.endswith("dw.weight") for name, _ in repeated.named_parameters()) == 1
    assert torch.equal(torch.export.export(repeated, (x,)).module()(x), expected)
    assert torch.equal(fx.symbolic_trace(repeated)(x), expected)


@torch.no_grad()
def test_filter_bases_of_full_rank_is_exact() -> None:
    model = randomise(CifarResNet(blocks=3))
    x = torch.randn(3, 3, 16, 16)
    before = model(x)
    converted(model, "filter-bases:shared=60,unique=16", 16, images=64)
    assert close(model(x), before, rtol=1e-3)


def test_new_norms_hold_the_responses_statistics() -> None:
    """In train mode the norm between filters and coefficients then changes next to nothing, either."""
    model = randomise(narrow_cifar_resnet(blocks=2))
    batch = torch.randn(64, 3, 16, 16)
    from sharefold.convert import convert_
    from sharefold.recipes import build_plan

    convert_(model, build_plan("filter-bases:shared=8", model, batch[:1]), calibration=batch, repair=False)
    layer = model.layer1[1].conv1
    seen: list[torch.Tensor] = []
    handle = layer.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    layer.runtime = "factored"
    with torch.no_grad():
        model(batch)
    handle.remove()
    responses = seen[0].transpose(0, 1).flatten(1)
    assert torch.allclose(layer.norm.running_mean, responses.mean(1), atol=0.05 * float(responses.std()))
    assert torch.allclose(layer.norm.running_var, responses.var(1), rtol=0.15)


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("store", ["int8", "mixed:step=0.002"])
def test_published_systems_are_stored_in_few_bits(recipe: str, store: str, tmp_path: Path) -> None:
    dense, model, _, _, size = small_converted(recipe)
    x = torch.randn(24, 3, size, size)
    before = model.eval()(x).detach()
    quantize_(model, store, x)
    with torch.no_grad():
        rounded = model(x)
        assert float((rounded - before).norm() / before.norm()) < 0.2
        save(model, tmp_path / "net.safetensors")
        assert torch.equal(load(tmp_path / "net.safetensors", model=dense)(x), rounded)
