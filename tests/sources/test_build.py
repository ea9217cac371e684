"""Architectures by name: what is built, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision

from sharefold.architectures.build import build_on_meta, make_base, own_models, registry, torchvision_urls
from sharefold.errors import SharefoldError
from sharefold.sources import build_base


def same_form(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (one, two)]
    return shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("base", "stock"),
    [
        (make_base("timm", "resnet18", {"num_classes": 7}), lambda: timm.create_model("resnet18", num_classes=7)),
        (make_base("timm", "resnet18.a1_in1k", {}), lambda: timm.create_model("resnet18")),
        (make_base("timm", "resnet18.tag_of_tomorrow", {}), lambda: timm.create_model("resnet18")),
        (make_base("torchvision", "mobilenet_v2", {}), lambda: torchvision.models.mobilenet_v2()),
        (
            {"library": "torchvision", "name": "regnet_y_400mf", "kwargs": {"num_classes": 3}},
            lambda: torchvision.models.regnet_y_400mf(num_classes=3),
        ),
        (
            make_base("torchvision", "fcn_resnet50", {"num_classes": 5}),
            lambda: torchvision.models.segmentation.fcn_resnet50(weights_backbone=None, num_classes=5),
        ),
    ],
)
def test_stock_architectures(base: dict[str, Any], stock: Any) -> None:
    model = build_base(base)
    assert not model.training and same_form(model, stock())
    meta = build_on_meta(base)
    assert same_form(meta, model) and all(p.is_meta for p in meta.parameters())


def test_own_models_are_in_timms_registry() -> None:
    assert {"resnet20_cifar", "lrunet"} <= set(own_models()) <= set(registry("timm"))
    model = build_base(make_base("timm", "lrunet", {"reuse": 2, "width": 1}))
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_other_input_channels_in_torchvision() -> None:
    model = build_base(make_base("torchvision", "resnet18", {"in_chans": 1, "num_classes": 4}))
    assert model(torch.rand(1, 1, 32, 32)).shape == (1, 4)
    assert model.conv1.bias is None and model.conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ({"library": "os", "name": "system", "kwargs": {}}, "unknown model library os"),
        ({"library": "torchvision", "name": "os.system"}, "unknown model tv:os.system"),
        ({"library": "timm", "name": "resnet5O"}, "did you mean resnet50"),
        ({"library": "timm", "name": "vgg11_bn_"}, "did you mean .*vgg11_bn"),
        ({"library": "timm", "name": "googlenet"}, "tv:googlenet exists"),
        ({"library": "timm", "name": "hf-hub:someone/model"}, "unknown model"),
        ({"library": "timm", "name": "local-dir:/tmp"}, "unknown model"),
        ({"library": "timm"}, "bad base"),
        ("resnet18", "bad base"),
        ({"library": "timm", "name": "resnet18", "kwargs": [1]}, "must be a table"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"block": print}}, "no plain value"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"layers": [2, {"a": object()}]}}, "no plain value"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"checkpoint_path": "/x"}}, "not allowed"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"pretrained": True}}, "not allowed"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"pretrained_cfg": {"url": "u"}}}, "not allowed"),
        ({"library": "torchvision", "name": "resnet18", "kwargs": {"weights": "DEFAULT"}}, "not allowed"),
        ({"library": "torchvision", "name": "fcn_resnet50", "kwargs": {"weights_backbone": "X"}}, "not allowed"),
        ({"library": "timm", "name": "resnet18", "kwargs": {"frills": 3}}, r"cannot be built with frills=3: TypeError"),
        ({"library": "torchvision", "name": "resnet18", "kwargs": {"in_chans": "many"}}, "positive number"),
        ({"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": "ten"}}, "cannot be built with"),
        ({"library": "timm", "name": "lrunet", "kwargs": {"width": 5}}, "give 1 or 2"),
    ],
)
def test_refusals(base: Any, words: str) -> None:
    with pytest.raises(SharefoldError, match=words) as error:
        build_base(base)
    assert "\n" not in str(error.value)


def test_urls_of_torchvision() -> None:
    assert {"resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"} == set(torchvision_urls("resnet50"))
