"""Networks whose results vary in number: compared at the outputs of their parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, mobilenet_v2

from sharefold.errors import SharefoldError
from sharefold.outputs import Comparison, read_outputs
from sharefold.outputs.taps import listening, taps_of

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Detector(nn.Module):
    """As many boxes as exceed a score."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        rows = self.head(self.backbone(x).mean((2, 3)))
        rows = 40 * (rows - rows.mean(1, keepdim=True))
        return [
            {"boxes": row[row > 0][:, None] * torch.tensor([0.0, 0.0, 1.0, 1.0]), "scores": row[row > 0].sigmoid(),
             "labels": (row > 0).nonzero()[:, 0]} for row in rows
        ]  # fmt: skip


def test_parts_are_compared_where_the_end_cannot_be() -> None:
    net = Detector().eval()
    reading = read_outputs(net, IMAGES)
    assert [leaf.name for leaf in reading.leaves] == ["backbone", "head"] and reading.detections
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight[2] += 0.3
    comparison = Comparison(net, IMAGES, reading)
    found, figures = comparison.measure(other)
    with torch.no_grad():
        a, b = (m.head(m.backbone(IMAGES).mean((2, 3))).double() for m in (net, other))
    assert found.leaves["backbone"] == 0
    variance = a.var(0)
    variance = variance.clamp_min(float(variance.mean()) * 1e-4)
    assert found.leaves["head"] == pytest.approx(float(((a - b).square() / variance).mean()), rel=1e-3)
    assert [(f.name, f.metric) for f in figures] == [("backbone", "error"), ("head", "error"), ("detections", "found")]
    assert comparison.figures(net)[-1].value == 1.0
    assert not any(m._forward_hooks for m in net.modules())


def test_a_network_without_any_tensor_cannot_be_compared() -> None:
    class Mute(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    assert not read_outputs(Mute(), IMAGES).comparable
    with pytest.raises(SharefoldError, match="give a criterion"):
        Comparison(Mute(), IMAGES)


def test_torchvisions_single_stage_detectors_say_what_their_heads_give() -> None:
    features = mobilenet_v2(width_mult=0.1, weights=None).features[:4]
    features.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(sizes=((16,),))
    net = detection.RetinaNet(features, 5, anchor_generator=anchors, min_size=32, max_size=32,
                              head=detection.retinanet.RetinaNetHead(8, 3, 5)).eval()  # fmt: skip
    reading = read_outputs(net, IMAGES)
    assert {leaf.name: leaf.kind for leaf in reading.leaves} == {
        "backbone": "regression", "head.cls_logits": "multi-label", "head.bbox_regression": "regression",
    }  # fmt: skip
    assert sum(leaf.weight for leaf in reading.leaves) == 2  # a part of the network each


def test_box_heads_of_two_networks_look_at_the_same_regions() -> None:
    torch.manual_seed(0)
    features = mobilenet_v2(width_mult=0.1, weights=None).features[:4]
    features.out_channels = 8
    anchors = detection.anchor_utils.AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    net = detection.FasterRCNN(features, min_size=32, max_size=32, rpn_anchor_generator=anchors,
                               box_head=detection.faster_rcnn.TwoMLPHead(8 * 7 * 7, 16),
                               box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 5)).eval()  # fmt: skip
    reading = read_outputs(net, IMAGES)
    kinds = {leaf.name: (leaf.kind, leaf.axis) for leaf in reading.leaves}
    assert kinds["roi_heads.box_predictor.0"] == ("logits", 2) and kinds["rpn.head.0.0"] == ("multi-label", 1)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.rpn.head.bbox_pred.weight.mul_(2)  # other proposals: another number of them
    found = Comparison(net, IMAGES, reading).divergence(other).leaves
    assert found["rpn.head.1.0"] > 0 and found["roi_heads.box_predictor.0"] == 0
    with torch.no_grad(), listening(net, taps_of(net)) as seen:
        net(IMAGES)
    assert len(seen["roi_heads.box_predictor"][0]) % len(IMAGES) == 0
