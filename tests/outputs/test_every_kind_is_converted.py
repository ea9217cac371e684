"""Networks of every kind through the whole job: each output counts in plans, repairs, refinement and figures."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from command_line import reported
from networks import images as pictures
from networks import net
from repair_works import done_by, work_of
from torch import Tensor, nn

import sharefold
from sharefold.calibration.calibrate import calibrate
from sharefold.errors import SharefoldError
from sharefold.repair.last_layers import LastLayers
from sharefold.repair.refine import refine

IMAGES = pictures(200)


class Spine(nn.Module):
    """Convolutions of one width, and ``end`` behind them."""

    def __init__(self, end: Any, *heads: Any, width: int = 12, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        layers = [m for _ in range(depth) for m in (nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())]
        self.body, self.heads, self.end = nn.Sequential(*layers), nn.ModuleList(heads), end
        for head in heads:
            head.reset_parameters()
        with torch.no_grad():
            for norm in (m for m in layers if isinstance(m, nn.BatchNorm2d)):
                norm.running_var.fill_(0.05)
                norm.running_mean.normal_(0, 0.1)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.end(self.body(self.stem(x)), self.heads)


def pooled(h: Tensor) -> Tensor:
    return h.mean((2, 3))


def detector() -> Spine:
    def end(h: Tensor, heads: nn.ModuleList) -> Tensor:
        boxes, scores = heads[0](h).flatten(2), heads[1](h).flatten(2)
        return torch.cat([100 + 40 * boxes, (5 * scores).sigmoid()], 1)

    return Spine(end, nn.Conv2d(12, 4, 1), nn.Conv2d(12, 6, 1))


def two_tasks() -> Spine:
    model = Spine(lambda h, m: {"age": m[0](pooled(h)), "marks": m[1](pooled(h))}, nn.Linear(12, 1), nn.Linear(12, 10))
    with torch.no_grad():
        model.heads[1].weight.mul_(50)
    return model


def one_number() -> Spine:
    return Spine(lambda h, m: m[0](pooled(h)), nn.Linear(12, 1))


def restorer() -> Spine:
    return Spine(lambda h, m: m[0](h), nn.Conv2d(12, 3, 3, padding=1))


def vectors() -> Spine:
    return Spine(lambda h, m: nn.functional.normalize(m[0](pooled(h))), nn.Linear(12, 16))


def converted(model: nn.Module, budget: str, **options: Any) -> sharefold.Conversion:
    plan = sharefold.plan(model, budget, IMAGES, method=("basis", "svd"))
    return sharefold.convert_(model, plan, IMAGES, **options)


def error(a: Tensor, b: Tensor) -> float:
    """Of ``b``, over what ``a`` varies by from image to image."""
    return float((a - b).norm() / (a - a.mean(0)).norm())


def test_neither_boxes_nor_scores_are_given_up() -> None:
    model = detector()
    done = converted(model, "55%")
    with torch.no_grad():
        a, b = done.original(IMAGES), model(IMAGES)
    boxes, scores = error(a[:, :4], b[:, :4]), error(a[:, 4:], b[:, 4:])
    assert 0.3 < scores / boxes < 3 and max(boxes, scores) < 1
    assert math.isnan(done.agreement) and [f.metric for f in done.outputs] == ["found"]


@pytest.mark.parametrize("make", [one_number, two_tasks, restorer, vectors])
def test_repairs_bring_every_output_nearer(make: Any) -> None:
    repaired, plain = make(), make()
    done = converted(repaired, "45%")
    bare = converted(plain, "45%", repair=False)
    assert math.isnan(done.agreement) and 0 < done.kl < 0.9 * bare.kl
    for mended, found in zip(done.outputs, bare.outputs, strict=True):
        assert mended.metric == found.metric in ("error", "psnr", "cosine")
        assert mended.value < found.value if mended.metric == "error" else mended.value > found.value


def test_each_of_two_tasks_has_its_figure() -> None:
    model = two_tasks()
    done = converted(model, "60%")
    report = calibrate(done.original, IMAGES).report_images
    with torch.no_grad():
        a, b = done.original(report), model(report)
    figures = {figure.name: figure for figure in done.outputs}
    assert set(figures) == {"age", "marks"} and all(f.images == len(report) for f in figures.values())
    assert figures["age"].interval[0] <= figures["age"].value <= figures["age"].interval[1]
    # Variances are of all images, so that on a few of them the error is nearly, not exactly, the one over their own.
    assert figures["age"].value == pytest.approx(error(a["age"], b["age"]), rel=0.5)
    json.dumps([figure.to_dict() for figure in done.outputs], allow_nan=False)


def test_refinement_sees_brightness() -> None:
    model, cal = restorer(), calibrate(restorer(), IMAGES)

    def off() -> float:
        with torch.no_grad():
            return float((model(cal.images) - cal.original(cal.images)).mean((1, 2, 3)).abs().mean())

    with torch.no_grad():
        model.heads[0].bias.add_(0.5)  # of all three colours: nothing that a softmax over them could see
    before = off()
    done = refine(model, cal, epochs=8, batch_size=20)
    assert before == pytest.approx(0.5, rel=1e-4) and done.kept and off() < 0.3 * before


def test_the_budget_is_used_whatever_the_outputs_are() -> None:
    for make in (one_number, restorer, vectors):
        assert sharefold.plan(make(), "70%", IMAGES, method="svd").size > 0.6


def test_half_precision_is_repaired() -> None:
    model = net("residual").half()
    images = IMAGES.half()
    done = sharefold.convert_(model, sharefold.plan(model, "60%", images, method=("basis", "svd")), images)
    refit = done.steps["refit"]
    assert refit.kept and math.isfinite(done.kl) and 0 < refit.kl_after < refit.kl_before
    assert all(p.dtype == torch.float16 for p in model.parameters())


def test_the_user_says_what_an_output_is_and_what_counts() -> None:
    model = restorer()
    cal = calibrate(model, IMAGES, outputs="logits:axis=1")
    assert cal.reading.classes is not None
    done = sharefold.convert_(model, sharefold.plan(model, "60%", cal, method="svd"), cal)
    assert done.outputs[0].metric == "agreement" and not math.isnan(done.agreement)
    with pytest.raises(SharefoldError, match="give them to calibrate"):
        sharefold.plan(restorer(), "60%", calibrate(restorer(), IMAGES), outputs="image")

    def red(original: Tensor, other: Tensor) -> Tensor:
        return (original - other)[:, 0].square().mean((1, 2))

    model = restorer()
    done = sharefold.convert_(model, sharefold.plan(model, "60%", IMAGES, method="svd"), IMAGES, criterion=red, refine=2)
    report = calibrate(done.original, IMAGES).report_images
    with torch.no_grad():
        assert done.kl == pytest.approx(float(red(done.original(report), model(report)).mean()), rel=1e-4)
    assert done.outputs[-1].metric == "criterion" and done.steps["refine"].kl_after <= done.steps["refine"].kl_before


@pytest.mark.parametrize("make", [restorer, two_tasks])
def test_last_layers_of_any_kind_are_fitted(make: Any) -> None:
    original, model = make(), make()
    with torch.no_grad():
        for head in model.heads:
            head.weight.add_(0.1 * torch.randn(head.weight.shape))
            head.bias.add_(1)
    done = done_by(LastLayers(), work_of(original, model, IMAGES[:60], IMAGES[60:100]))
    assert done.kept and done.kl_after < 1e-4 * done.kl_before  # the weakest pull towards the old weights is 1e-3


def test_frozen_last_layers_stay() -> None:
    original = restorer()
    model = copy.deepcopy(original)
    model.heads[0].bias.requires_grad_(False)
    assert "no output" in done_by(LastLayers(), work_of(original, model, IMAGES[:60], IMAGES[60:100])).reason


def test_the_command_keeps_an_error_and_lists_outputs(tmp_path: Any) -> None:
    common = ["convert", "timm:test_resnet", "--no-pretrained", "--num-classes", "1", "--input-size", "3,32,32",
              "--calib-count", "200", "--method", "svd", "--no-repair"]  # fmt: skip
    report = reported(*common, "--keep", "error 60%", "-o", tmp_path / "small")
    (found,) = report["outputs"]
    assert found["metric"] == "error" and found["interval"][1] <= 0.6 and report["agreement"] is None
    assert report["params"]["after"] < report["params"]["before"]
    inspected = reported("inspect", "timm:test_resnet", "--no-pretrained", "--outputs", "logits:axis=1")
    assert inspected["outputs"][0]["kind"] == "logits" and inspected["outputs"][0]["why"] == "given"
