"""Behaviour that every registered network shares: shapes, modes, timm's interface, tracing, export."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from torch import nn

import sharefold.models  # noqa: F401  (registers the networks)

SMALL = [
    ("resnet20_cifar", {}),
    ("resnet164_cifar", {}),
    ("wrn_40_4_cifar", {}),
    ("convmixer_256_16_cifar", {"depth": 2}),
    ("se_resnet14_cifar", {}),
    ("lrunet", {"reuse": 3}),
    ("lrunet_unrolled", {"reuse": 3}),
]
DEEP = [
    ("resnet32_cifar", {}),
    ("resnet44_cifar", {}),
    ("resnet56_cifar", {}),
    ("resnet110_cifar", {}),
    ("wrn_28_10_cifar", {}),
    ("convmixer_256_16_cifar", {}),
    *((f"se_resnet{depth}_cifar", {}) for depth in (20, 26, 38, 50, 62)),
    ("lrunet", {"width": 2}),
    ("lrunet_unrolled", {}),
]
small = pytest.mark.parametrize(("name", "kwargs"), SMALL, ids=[name for name, _ in SMALL])


def images(batch: int = 2, chans: int = 3, size: int = 16) -> torch.Tensor:
    return torch.randn(batch, chans, size, size, generator=torch.Generator().manual_seed(0))


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Eval mode after one pass that gives every BatchNorm statistics other than 0 and 1."""
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize(("name", "kwargs"), SMALL + DEEP)
def test_forward_shape(name: str, kwargs: dict[str, int]) -> None:
    model = timm.create_model(name, num_classes=7, **kwargs).eval()
    with torch.inference_mode():
        out = model(images(1))
    assert out.shape == (1, 7)
    assert torch.isfinite(out).all()


@small
def test_train_step_reaches_every_parameter(name: str, kwargs: dict[str, int]) -> None:
    model = timm.create_model(name, **kwargs).train()
    if name.startswith("lrunet"):  # the ReLU on the logits must not be dead for this check
        nn.init.constant_(model.get_classifier().bias, 10.0)
    out = model(images(4, size=32))
    nn.functional.cross_entropy(out, torch.arange(4)).backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


@small
def test_train_and_eval_differ_through_batchnorm(name: str, kwargs: dict[str, int]) -> None:
    model = timm.create_model(name, **kwargs)
    x = images(4)
    model.eval()
    with torch.no_grad():
        features = model.forward_features(x)
        assert torch.equal(features, model.forward_features(x))
        model.train()
        assert not torch.allclose(features, model.forward_features(x))


@small
def test_timm_interface(name: str, kwargs: dict[str, int]) -> None:
    model = timm.create_model(name, in_chans=1, **kwargs).eval()
    x = images(2, chans=1, size=32)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32) and cfg["crop_pct"] == 1.0 and cfg["num_classes"] == 10
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[:2] == (2, model.num_features)
        assert tuple(features.shape[2:]) == tuple(cfg["pool_size"])
        assert torch.equal(model.forward_head(features), model(x))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        model.reset_classifier(5)
        assert model(x).shape == (2, 5) and model.num_classes == 5 and not model.get_classifier().training
        model.reset_classifier(0)
        assert model(x).shape == (2, model.head_hidden_size)
        assert torch.allclose(model(x), model.forward_head(features, pre_logits=True), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet20_cifar", "wrn_40_4_cifar", "se_resnet14_cifar"])
def test_features_only(name: str) -> None:
    backbone = timm.create_model(name, features_only=True).eval()
    whole = timm.create_model(name).eval()
    with torch.no_grad():
        maps = backbone(images(1, size=32))
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in whole.feature_info]
    assert [m.shape[2] for m in maps] == [32, 16, 8]


@small
def test_fx_trace_and_deepcopy_give_the_same_logits(name: str, kwargs: dict[str, int]) -> None:
    x = images(2)
    model = settled(timm.create_model(name, **kwargs), x)
    traced = torch.fx.symbolic_trace(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(traced(x), expected)
        assert torch.equal(clone(x), expected)


@pytest.mark.parametrize(
    ("name", "kwargs"), [case for case in SMALL if case[0] not in ("resnet164_cifar", "wrn_40_4_cifar")]
)
def test_export(name: str, kwargs: dict[str, int]) -> None:
    x = images(2)
    model = settled(timm.create_model(name, **kwargs), x)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = images(3)
    with torch.no_grad():
        assert torch.allclose(program.module()(other), model(other), atol=1e-5)


@pytest.mark.sweep
@pytest.mark.parametrize(("name", "kwargs"), DEEP + [case for case in SMALL if case[0] in ("resnet164_cifar",)])
def test_export_deep(name: str, kwargs: dict[str, int]) -> None:
    x = images(1)
    model = timm.create_model(name, **kwargs).eval()
    with torch.no_grad():
        assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x), atol=1e-4)


@pytest.mark.parametrize(("name", "kwargs"), [("resnet20_cifar", {}), ("lrunet", {"reuse": 2})])
def test_onnx(name: str, kwargs: dict[str, int]) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    x = images(2, size=32)
    model = settled(timm.create_model(name, **kwargs), x)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    session = runtime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(out), model(x), atol=1e-4)
