"""Several budgets of one network: sizes, order, statistics gathered once."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest
import torch
from torch import nn

import sharefold
from sharefold.budget import parse_combined
from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.options import ConvertOptions, PlanOptions
from sharefold.sweep import SweepOptions, parse_budgets, sweep, to_csv

BASIS = SweepOptions(PlanOptions("basis"), ConvertOptions(repair=False))


def scores(model: nn.Module) -> dict[str, Any]:
    return {"top1": 0.5, "top5": 0.9, "loss": float(sum(p.numel() for p in model.parameters()))}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return sharefold.open_source("timm:digits_resnet:blocks=2,width=16", pretrained=False).model


def test_every_budget_is_kept_and_the_network_stays(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    made: list[Statistics] = []
    original = Statistics.__init__
    monkeypatch.setattr(Statistics, "__init__", lambda self, *a, **k: (made.append(self), original(self, *a, **k))[1])
    kept: dict[str, tuple[nn.Module, dict]] = {}
    cal = sharefold.calibrate(net, torch.randn(400, 1, 8, 8))  # 60 of them to report on
    points = sweep(
        cal, ["60%", "40%"], scores, BASIS, keep=lambda budget, model, metrics: kept.update({budget: (model, metrics)})
    )
    assert [point.budget for point in points] == ["dense", "60%", "40%"] and len(made) == 1 and made[0].passes == 1
    assert points[0].params == 42_362 and points[0].share == 1 and points[0].agreement == 1
    assert points[1].params <= 0.6 * 42_362 and points[2].params <= 0.4 * 42_362 < points[1].params
    for point in points[1:]:
        model, metrics = kept[point.budget]
        assert sum(p.numel() for p in model.parameters()) == point.params == point.loss == metrics["params"]
        assert point.share == point.params / 42_362 and 0 < point.macs <= points[0].macs and 0 <= point.agreement <= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    rows = list(csv.DictReader(io.StringIO(to_csv(points))))
    assert [row["budget"] for row in rows] == ["dense", "60%", "40%"] and float(rows[2]["share"]) == points[2].share


def test_results_do_not_depend_on_the_other_budgets(net: nn.Module) -> None:
    images = torch.randn(400, 1, 8, 8)
    alone = sweep(sharefold.calibrate(net, images), ["40%"], scores, BASIS)[1]
    second = sweep(sharefold.calibrate(net, images), ["60%", "40%"], scores, BASIS)[2]
    assert (alone.params, alone.agreement) == (second.params, second.agreement)
    assert alone.kl == pytest.approx(second.kl, rel=1e-3)


def test_an_unreachable_budget_is_refused_before_any_conversion(net: nn.Module) -> None:
    kept: list[str] = []
    with pytest.raises(SharefoldError, match="the floor is"):
        cal = sharefold.calibrate(net, torch.randn(40, 1, 8, 8))
        sweep(cal, ["60%", "1%"], scores, BASIS, keep=lambda *a: kept.append(a[0]))
    assert not kept


@pytest.mark.parametrize(
    ("text", "words"), [
        ("", "no budgets"), (" , ", "no budgets"), ("50%,x", "'x'"), ("50%,0.5", "twice"), (" ; ", "no budgets"),
        ("50%, 70% MACs; 70% MACs, 0.5", "twice"), ("50%, 2M;", "bounds the parameters twice"), ("50%,; 4ms", "empty part"),
    ],
)
def test_bad_budgets(text: str, words: str) -> None:
    with pytest.raises(SharefoldError, match=words):
        parse_budgets(text)
    assert [b.text for b in parse_budgets("25%, 2M")] == ["25%", "2M"]
    assert [b.text for b in parse_budgets("50%,70% MACs; 25%;")] == ["50%, 70% MACs", "25%"]
    assert [b.text for b in parse_budgets(["50%, 70% MACs", "2,000"])] == ["50%, 70% MACs", "2,000"]


def test_budgets_of_several_parts(net: nn.Module) -> None:
    cal = sharefold.calibrate(net, torch.randn(40, 1, 8, 8))
    options = SweepOptions(PlanOptions(("svd", "spatial")), ConvertOptions(repair=False))
    points = sweep(cal, ["60%, 70% MACs", parse_combined("80%, 50% MACs")], scores, options)
    assert [point.budget for point in points] == ["dense", "60%, 70% MACs", "80%, 50% MACs"]
    for point, (params, macs) in zip(points[1:], ((0.6, 0.7), (0.8, 0.5)), strict=True):
        assert point.params <= params * points[0].params and point.macs <= macs * points[0].macs
    assert list(csv.DictReader(io.StringIO(to_csv(points))))[1]["budget"] == "60%, 70% MACs"
