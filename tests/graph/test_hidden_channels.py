"""Which channels can be left out, and why others cannot: every kind of block, on tiny networks."""

from __future__ import annotations

import pytest
import timm
import torch
from hidden_nets import VGG, Excited, Head, conv
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.graph.hidden_channels import HiddenSpace, hidden_spaces
from sharefold.models.cifar_resnet import CifarResNet


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, step: object, inner: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.first, self.step, self.second = conv(8, 8), step, conv(inner, 8, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.step(self.first(x)))  # type: ignore[operator]


def spaces(body: nn.Module, exclude: str | None = None) -> tuple[list[HiddenSpace], dict[str, str]]:
    model = Head(body).eval()
    return hidden_spaces(model, analyze(model, torch.randn(1, 3, 8, 8)), exclude)


def test_everything_that_carries_a_channel_is_found() -> None:
    found, reasons = spaces(Excited())
    assert [(s.writer, s.gates, s.through, s.readers, s.channels) for s in found] == [
        ("body.expand", ("body.excite",), ("body.norm", "body.act", "body.depthwise"), ("body.reduce", "body.project"), 12),
        ("body.reduce", (), (), ("body.excite",), 3),
    ]
    assert reasons == {"stem": "several layers add into them", "head": "an output of the model"}


def shuffle(x: Tensor) -> Tensor:
    return x.view(x.size(0), 2, 4, 8, 8).transpose(1, 2).reshape(x.size(0), 8, 8, 8)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (Between(lambda y: torch.cat([y, y], 1), 16), "concatenated with others along the channels"),
        (Between(shuffle), "split or merged with other axes by view"),
        (Between(lambda y: y, groups=2), "read by the grouped convolution body.second"),
        (Between(lambda y: y.softmax(1)), "softmax looks at all of them together"),
        (Between(lambda y: y * y.mean(1, keepdim=True)), "mean looks at all of them together"),
        (Between(nn.GroupNorm(1, 8)), "body.step (GroupNorm) looks at all of them together"),
        (Between(lambda y: y.reshape(-1, 8, 8, 8)), "reshape is written with their number"),
        (Between(nn.LocalResponseNorm(3)), "read by body.step (LocalResponseNorm)"),
    ],
)
def test_what_cannot_lose_channels_says_why(body: nn.Module, reason: str) -> None:
    found, reasons = spaces(body)
    assert not found
    assert reasons["body.first"] == reason


def test_a_layer_twice_a_tied_norm_a_hook_and_an_excluded_layer() -> None:
    twice = Between(nn.Identity())
    twice.second = twice.first
    assert "body.first" not in {space.writer for space in spaces(twice)[0]}
    tied = nn.Sequential(Between(nn.BatchNorm2d(8)), Between(nn.BatchNorm2d(8)))
    tied[1].step.weight = tied[0].step.weight  # type: ignore[union-attr]
    assert "has tensors that other modules use too" in spaces(tied)[1]["body.0.first"]
    hooked = Between(nn.BatchNorm2d(8))
    hooked.step.register_forward_hook(lambda *_: None)  # type: ignore[attr-defined]
    assert spaces(hooked)[1]["body.first"] == "seen by a hook of body.step"
    assert spaces(Excited(), exclude="depthwise")[1]["body.expand"] == "body.depthwise is excluded"
    with pytest.raises(SharefoldError, match="regular expression"):
        spaces(Excited(), exclude="(")


def test_without_a_graph_nothing_is_known() -> None:
    model = Head(Excited()).eval()
    found, reasons = hidden_spaces(model, analyze(model, torch.randn(1, 3, 8, 8), symbolic=False))
    assert not found
    assert set(reasons.values()) == {"where its outputs go is not known"}


@pytest.mark.parametrize(
    ("model", "writers"),
    [
        (CifarResNet(1, num_classes=4), {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}),
        (
            ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=8),
            {"conv1", *(f"layer{k}.0.conv{c}" for k in (1, 2, 3, 4) for c in (1, 2))},
        ),
        (VGG, {"0", "4", "7", "11"}),
        (
            timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)),
            {f"stages.{k}.blocks.0.mlp.fc1" for k in range(4)},
        ),
        (
            timm.create_model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2)),
            {f"features.denseblock{k}.denselayer{n}.conv1" for k in (1, 2, 3, 4) for n in (1, 2)},
        ),
    ],
)
def test_kinds_of_networks(model: nn.Module, writers: set[str]) -> None:
    model.eval()
    found, reasons = hidden_spaces(model, analyze(model, torch.randn(1, 3, 32, 32)))
    assert writers <= {space.writer for space in found}
    assert not writers & reasons.keys()
