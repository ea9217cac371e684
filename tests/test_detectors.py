"""Networks that return boxes instead of logits: converted without repairs, never half converted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from command_line import call, reported
from networks import Mute, images, net
from torch import Tensor, nn

import sharefold
from sharefold.errors import SharefoldError
from sharefold.measure import first_logits


class Detector(nn.Module):
    """As torchvision's: a dictionary an image, with as many boxes as exceed a score."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = net(blocks=2)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        found = [(row[row > 0], (row > 0).nonzero()[:, 0]) for row in self.backbone(x)]
        return [{"boxes": row[:, None].expand(-1, 4), "scores": row.sigmoid(), "labels": labels} for row, labels in found]


def test_boxes_are_no_logits() -> None:
    torch.manual_seed(0)
    with pytest.raises(SharefoldError, match="detections"):
        first_logits(Detector()(images()[:2]))


def test_a_detector_is_repaired_by_what_its_parts_give() -> None:
    torch.manual_seed(0)
    model = Detector()
    plan = sharefold.plan(model, budget="70%", calibration=images(), method=("basis", "svd"))
    done = sharefold.convert_(model, plan, calibration=images(200), refine=1)
    assert sum(p.numel() for p in model.parameters()) == plan.params_after < 0.7 * plan.params_before + 1
    assert math.isnan(done.agreement) and 0 < done.kl < 1 and done.report_images == 50
    assert done.steps["refine"]["kl_after"] <= done.steps["refine"]["kl_before"]
    assert [(f.name, f.metric) for f in done.outputs] == [("backbone", "error"), ("detections", "found")]
    assert all(torch.isfinite(found["boxes"]).all() for found in model(images()[:4]))


def test_what_cannot_be_compared_is_converted_without_repairs() -> None:
    torch.manual_seed(0)
    model = Mute(net(blocks=2))
    plan = sharefold.plan(model, budget="70%", calibration=images(), method=("basis", "svd"))
    done = sharefold.convert_(model, plan, calibration=images())
    assert math.isnan(done.agreement) and math.isnan(done.kl) and done.outputs == []
    assert not done.steps["refit"]["kept"] and "nothing to decide by" in done.steps["refit"]["reason"]


def test_refinement_of_what_cannot_be_compared_is_refused_before_anything_changes() -> None:
    torch.manual_seed(0)
    model = Mute(net(blocks=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = sharefold.plan(model, budget="70%", calibration=images(), method=("basis", "svd"))
    with pytest.raises(SharefoldError, match="nothing to learn from"):
        sharefold.convert_(model, plan, calibration=images(), refine=1)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_command_converts_a_torchvision_detector(tmp_path: Path) -> None:
    out = tmp_path / "small"
    # Three classes instead of 91: most of a run is sorting out boxes, a class at a time.
    common = ["convert", "tv:ssdlite320_mobilenet_v3_large", "--no-pretrained", "--num-classes", "3", "--calib-count", "4",
              "--method", "svd", "-o", out]  # fmt: skip
    refused = call(*common, "--json", "--keep-agreement", "99%")
    assert refused.exit_code == 2 and "there is error, found" in refused.output and not out.exists()
    report = reported(*common)
    assert report["agreement"] is None and report["params"]["after"] <= report["params"]["before"] / 2
    boxes = sharefold.load(out)(torch.rand(1, 3, 96, 96))
    assert len(boxes) == 1 and boxes[0]["boxes"].shape[1] == 4
