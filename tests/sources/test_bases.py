"""The architecture behind a network in memory: found again, through ``save`` and ``load``, and never a wrong one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from own_nets import OwnNet
from torch import nn

import sharefold
import sharefold.models
from sharefold.sources import base_of, build_base, open_source


def as_own(model: nn.Module) -> dict[str, Any] | None:
    """Its base, without what was noted on it."""
    vars(model).pop("sharefold_base", None)
    return base_of(model)


@pytest.mark.parametrize(
    ("name", "kwargs", "found"),
    [
        ("resnet20_cifar", {}, {"num_classes": 10}),
        ("resnet20_cifar", {"num_classes": 7}, {"num_classes": 7}),
        ("resnet18", {"num_classes": 0}, {"num_classes": 0}),
        ("resnet10t", {"num_classes": 3, "in_chans": 1}, {"num_classes": 3, "in_chans": 1}),
        ("resnet18.a1_in1k", {}, {"num_classes": 1000}),
    ],
)
def test_names_of_timm(name: str, kwargs: dict[str, Any], found: dict[str, Any]) -> None:
    base = base_of(timm.create_model(name, **kwargs))
    assert base == {"library": "timm", "name": name.partition(".")[0], "kwargs": found}


def test_names_of_torchvision() -> None:
    for classes in (1000, 5):
        base = base_of(torchvision.models.resnet18(num_classes=classes))
        assert base == {"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": classes}}


SOURCES = [
    ("timm:digits_resnet:blocks=2,width=8", {}),
    ("timm:digits_resnet:width=8", {"num_classes": 3}),
    ("timm:resnet20_cifar", {"in_chans": 1}),
    ("timm:resnet10t:output_stride=8,stem_width=16", {}),
    ("timm:lrunet:reuse=2,width=1", {}),
    ("tv:resnet18", {"in_chans": 2, "num_classes": 4}),
    ("tv:mobilenet_v2:width_mult=0.5", {}),
]


@pytest.mark.parametrize(("source", "options"), SOURCES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_open_source_built_is_noted(source: str, options: dict[str, int]) -> None:
    opened = open_source(source, pretrained=False, **options)  # type: ignore[arg-type]
    assert base_of(opened.model) == opened.base and base_of(copy.deepcopy(opened.model)) == opened.base
    again = build_base(opened.base)
    assert again.load_state_dict(opened.model.state_dict()) and base_of(again) == opened.base


@pytest.mark.parametrize("source", ["timm:digits_resnet:blocks=2,width=8", "timm:resnet20_cifar:in_chans=1,num_classes=4"])
def test_round_trip_without_the_dense_module(source: str, tmp_path: Path) -> None:
    model = open_source(source, pretrained=False).model
    images = torch.randn(20, 1, 8, 8)
    plan = sharefold.plan(model, budget="60%", method="basis", calibration=images)
    sharefold.convert_(model, plan, calibration=images, repair=False)
    loaded = sharefold.load(sharefold.save(model, tmp_path / "net"))
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    assert base_of(sharefold.expand(loaded)) == model.sharefold_config.base


def test_builder_arguments_of_a_checkpoint(tmp_path: Path) -> None:
    made = timm.create_model("resnet10t", num_classes=3, output_stride=8)
    torch.save(made.state_dict(), tmp_path / "w.pt")
    opened = open_source(tmp_path / "w.pt", arch="timm:resnet10t:output_stride=8")
    assert opened.base["kwargs"] == {"output_stride": 8, "num_classes": 3} and base_of(opened.model) == opened.base


def test_a_note_that_no_longer_holds() -> None:
    model = open_source("timm:digits_resnet:blocks=2,width=8", pretrained=False).model
    model.fc = nn.Linear(model.fc.in_features, 3)
    assert base_of(model) is None
    model = open_source("timm:resnet20_cifar", pretrained=False).model
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))  # printed nowhere
    assert base_of(model) is None
    model = open_source("tv:resnet18:num_classes=4", pretrained=False).model
    model.sharefold_base = {"library": "timm", "name": "os.system", "kwargs": {}}  # type: ignore[assignment]
    assert base_of(model) == {"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 4}}


def test_networks_of_the_users_own() -> None:
    assert base_of(OwnNet()) is None
    block = torchvision.models.resnet.BasicBlock
    plain = torchvision.models.ResNet(block, [2, 2, 2, 2], num_classes=4)
    assert base_of(plain) == {"library": "torchvision", "name": "resnet18", "kwargs": {"num_classes": 4}}

    class ResNet(torchvision.models.ResNet):
        """Prints as torchvision's and computes something else."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    own = ResNet(block, [2, 2, 2, 2], num_classes=4)
    assert str(own) == str(plain) and base_of(own) is None


def test_equal_shapes_are_not_enough() -> None:
    """Neither strides nor activations show in the names and shapes of a state dict."""
    strided = timm.create_model("resnet10t", num_classes=3, output_stride=8)
    assert strided.state_dict().keys() == timm.create_model("resnet10t", num_classes=3).state_dict().keys()
    assert as_own(strided) is None
    model = torchvision.models.resnet18(num_classes=4)
    model.conv1.stride = (1, 1)
    assert as_own(model) is None
    smooth = open_source("timm:resnet20_cifar", pretrained=False).model
    for module in smooth.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    assert base_of(smooth) is None and as_own(smooth) is None
