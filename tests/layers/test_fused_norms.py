"""Fused norms compute the same, with the same gradients, and leave no trace."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import sharefold
import sharefold.models
from sharefold.graph import analyze
from sharefold.layers.norm_fusion import fused_for_inference, norms_fused


def trained(name: str, **kwargs: object) -> nn.Module:
    """A network whose norms have seen something."""
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model.eval()


def loss_and_gradients(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    out = model(images)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "converted"), [("resnet20_cifar", False), ("resnet20_cifar", True), ("efficientnet_lite0", False)]
)
def test_outputs_and_gradients_equal(name: str, converted: bool) -> None:
    model = trained(name, num_classes=10)
    images = torch.randn(8, 3, 32, 32)
    graph = analyze(model, images[:1])
    if converted:
        cal = sharefold.calibrate(model, images, graph=graph)
        plan = sharefold.plan(model, budget="95%", calibration=cal, exclude="^layer3")
        sharefold.convert_(model, plan, calibration=images, repair=False)
        assert plan.groups
    norms = {layer: record.norm for layer, record in graph.layers.items()}
    wanted, wanted_grads = loss_and_gradients(model, images)
    keys = {module: set(module.__dict__) for module in model.modules()}
    with norms_fused(model, norms) as fused:
        assert len(fused) >= 0.9 * sum(norm is not None for norm in norms.values())
        found, grads = loss_and_gradients(model, images)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    assert grads.keys() == wanted_grads.keys()
    for key, value in wanted_grads.items():
        assert torch.allclose(grads[key], value, atol=2e-3 * float(value.abs().max()) + 1e-7), key
    assert {module: set(module.__dict__) for module in model.modules()} == keys
    assert torch.equal(loss_and_gradients(model, images)[0], wanted)


def test_training_norms_are_left_alone() -> None:
    model = trained("resnet20_cifar")
    norms = {name: record.norm for name, record in analyze(model, torch.randn(1, 3, 32, 32)).layers.items()}
    with norms_fused(copy.deepcopy(model).train(), norms) as fused:
        assert fused == []


def test_constant_filters_are_computed_once_in_the_dtype_asked_for() -> None:
    model = trained("resnet20_cifar")
    images = torch.randn(4, 3, 32, 32)
    norms = {name: record.norm for name, record in analyze(model, images[:1]).layers.items()}
    wanted = model(images).detach()
    with norms_fused(model, norms, constant=True) as fused, torch.no_grad():
        assert len(fused) == 19
        assert torch.allclose(model(images), wanted, atol=1e-4 * float(wanted.abs().max()))
    with norms_fused(model, norms, constant=True, dtype=torch.bfloat16), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
        assert rounded.dtype == torch.bfloat16 and not torch.equal(rounded.float(), wanted)
        assert torch.allclose(rounded.float(), wanted, atol=0.05 * float(wanted.abs().max()))
    assert torch.equal(model(images), wanted)


def test_networks_to_compare_run_fused_whatever_pads_them() -> None:
    """Several at once; TensorFlow's padding too; changes between two runs are seen, networks of halves left alone."""
    model = trained("tf_efficientnet_lite0", num_classes=10)
    images = torch.randn(2, 3, 64, 64)
    norms = {name: record.norm for name, record in analyze(model, images[:1]).layers.items()}
    assert any(type(model.get_submodule(name)).__name__ == "Conv2dSame" for name, norm in norms.items() if norm)
    other = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(images)
        with norms_fused(model, norms) as fused:
            assert set(fused) == {name for name, norm in norms.items() if norm}
        for factor in (1.0, 2.0):
            other.bn1.weight.mul_(factor)
            changed = other(images)
            with fused_for_inference(model, other, norms=norms):
                assert "forward" in model.conv_stem.__dict__ and "forward" in other.conv_stem.__dict__
                torch.testing.assert_close(model(images), wanted, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(other(images), changed, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed, wanted, atol=1e-3) and "forward" not in model.conv_stem.__dict__
        half = model.half()
        with fused_for_inference(half, norms=norms):
            assert "forward" not in half.conv_stem.__dict__
