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


class BasicBlock(torchvision.models.resnet.BasicBlock):
    """Prints as torchvision's and computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


def doubled(*parts: Any) -> Any:
    """As a pre-hook (module, inputs) and as a hook (module, inputs, output)."""
    return 2 * parts[2] if len(parts) == 3 else (2 * parts[1][0],)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


@pytest.mark.parametrize("how", ["block", "forward", "method", "hook", "pre-hook"])
def test_code_that_is_not_printed(how: str) -> None:
    model = resnet()
    if how == "block":
        model = torchvision.models.ResNet(BasicBlock, [2, 2, 2, 2], num_classes=4)
        assert str(model) == str(resnet())
    elif how == "forward":
        model.layer1.forward = lambda x: x
    elif how == "method":
        model._forward_impl = lambda x: 2 * type(model)._forward_impl(model, x)  # type: ignore[assignment]
    elif how == "hook":
        model.layer2.register_forward_hook(doubled)
    else:
        model.register_forward_pre_hook(doubled)
    assert base_of(model) is None


def test_values_that_are_neither_printed_nor_tensors() -> None:
    """Only a run shows them; it leaves the network and the random states as they were."""
    model = timm.create_model("nf_regnet_b0", num_classes=3)
    for name, parameter in model.named_parameters():
        if name.endswith("gain"):  # no branch adds anything at first
            nn.init.ones_(parameter)
    images, state, random = torch.randn(1, 3, 64, 64), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert base_of(model, images) == {"library": "timm", "name": "nf_regnet_b0", "kwargs": {"num_classes": 3}}
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.stages[0][0].alpha = 0.9
    assert base_of(model, images) is None


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_networks_of_other_types_are_known(kind: torch.dtype) -> None:
    assert base_of(timm.create_model("digits_resnet").to(kind), torch.randn(1, 1, 8, 8)) is not None


def test_the_input_transform_of_googlenet_is_its_own() -> None:
    """Weights that torchvision published want it, so that builders switch it on; no tensor tells of it."""
    for transform in (False, True):
        model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False, transform_input=transform)
        base = base_of(model, torch.randn(1, 3, 64, 64))
        assert base is not None and base["kwargs"]["transform_input"] is transform


def test_networks_that_draw_random_numbers_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torchvision.models.ResNet.forward
    monkeypatch.setattr(torchvision.models.ResNet, "forward", lambda self, x: plain(self, x) + torch.rand(4))
    assert base_of(resnet(), torch.randn(1, 3, 32, 32)) is not None
