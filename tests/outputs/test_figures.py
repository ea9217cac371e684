"""Figures and intervals worked out by hand, and what may be asked of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from answer_tables import IMAGES, N, Table, draw, reading
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.outputs import Comparison, Figure, Leaf, OutputReading, parse_target
from sharefold.outputs.found_again import figure_of_detections
from sharefold.outputs.intervals import of_mean, of_ratio, of_shares, trials_needed, wilson


def figures(a: list[Tensor], b: list[Tensor], read: OutputReading, batch_size: int = 4) -> list[Figure]:
    return Comparison(Table(*a), IMAGES, read, batch_size=batch_size).figures(Table(*b))


def test_wilson_against_its_quadratic() -> None:
    # The ends are where |share - p| = z sqrt(p (1 - p) / n).
    for share, count in ((0.9, 50), (1.0, 200), (0.0, 7), (0.5, 1)):
        for p in wilson(share, count):
            assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count), abs=1e-9)
    assert wilson(1.0, 200)[1] == 1.0 and wilson(0.3, 0) == (0.0, 1.0)
    needed = trials_needed(0.99)
    assert wilson(1.0, needed)[0] >= 0.99 > wilson(1.0, needed - 1)[0]


def test_intervals_of_means() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    half = 1.959964 * math.sqrt(14 / 3 / 4)
    assert of_mean(values) == pytest.approx((3 - half, 3 + half))
    assert of_shares(torch.tensor([1.0, 1.0, 0.0]), 1) == wilson(2 / 3, 3)
    low, high = of_shares(torch.ones(10), 100)  # no image says otherwise: all decisions are what there is to say
    assert low == wilson(1.0, 1000)[0] and high == 1.0


def test_intervals_of_ratios_count_images() -> None:
    hits, trials = torch.tensor([5, 0, 5, 0]), torch.tensor([5, 5, 5, 5])
    assert of_ratio(hits, trials) == pytest.approx(wilson(0.5, 3))  # as far apart as images can be: one of them is one trial
    assert of_ratio(torch.tensor([2, 2]), torch.tensor([4, 4])) == wilson(0.5, 8)
    assert of_ratio(torch.tensor([4, 4]), torch.tensor([4, 4])) == wilson(1.0, 8)
    assert of_ratio(torch.zeros(3), torch.zeros(3)) == (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):  # 40 images whose anchors share their fate, half of them lost
        fate, many = torch.rand(40, generator=generator) < 0.5, torch.randint(1, 50, (40,), generator=generator)
        low, high = of_ratio(fate * many, many)
        inside += low <= 0.5 <= high
    assert inside >= 180


def test_agreement_is_of_classes_on_their_axis() -> None:
    a, b = draw(3, 5), draw(3, 5, seed=1)
    (found,) = figures([a], [b], reading(("logits", 2)))
    same = (a.argmax(2) == b.argmax(2)).double().mean(1)
    assert (found.metric, found.value, found.images) == ("agreement", pytest.approx(float(same.mean())), N)
    assert found.interval == of_shares(same, 3)


def test_one_prediction_an_image_has_wilsons_interval() -> None:
    a = draw(5)
    b = a.clone()
    b[0] = -b[0]
    (found,) = figures([a], [b], reading(("logits", 1)))
    assert found.value == 5 / 6 and found.interval == wilson(5 / 6, 6)


def test_masks_have_decisions_and_iou() -> None:
    a, b = torch.zeros(N, 1, 2, 2), torch.zeros(N, 1, 2, 2)
    a[0, 0, 0], b[0, 0, 0, 0] = 1, 1  # two pixels, of which one is found: IoU 1/2
    a[1, 0], b[1, 0] = 0.9, 0.6  # the same at one half
    leaf = Leaf("0", "binary", 1, activated=True, source="0")
    decisions, iou = figures([a], [b], OutputReading([leaf]))
    assert (decisions.metric, decisions.value) == ("decisions", pytest.approx((0.75 + 5) / 6))
    assert (iou.metric, iou.value) == ("iou", pytest.approx(0.75))  # of the two images with something in them
    logits = OutputReading([Leaf("0", "binary", 1, source="0")])
    assert figures([a - 0.5], [b - 0.5], logits)[0].value == decisions.value


def test_psnr_of_images_by_hand() -> None:
    a = torch.rand(N, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    (found,) = figures([a], [a + 0.01], reading(("image", 1)))
    assert found.value == pytest.approx(40.0, abs=1e-3) and found.interval == pytest.approx((40.0, 40.0), abs=1e-3)
    (bytes_,) = figures([255 * a], [255 * a + 2.55], reading(("image", 1)))
    span = float((a.amax((1, 2, 3)) - a.amin((1, 2, 3))).mean())  # of an image, so that it does not grow with their number
    assert bytes_.value == pytest.approx(20 * math.log10(255 * span / 2.55), abs=1e-3)
    assert figures([a], [a], reading(("image", 1)))[0].value == 200.0


def test_cosine_of_embeddings() -> None:
    a, b = draw(8), draw(8, seed=1)
    (found,) = figures([a], [b], reading(("embedding", 1)))
    wanted = (a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)
    assert found.metric == "cosine" and found.value == pytest.approx(float(wanted.mean()), abs=1e-6)


def test_relative_error_of_everything_else() -> None:
    a = draw(3)
    (found,) = figures([a], [a + 0.1 * a.std(0)], reading(("regression", 1)))
    assert found.metric == "error" and found.value == pytest.approx(0.1, rel=1e-4)
    assert not any(figure.metric == "agreement" for figure in figures([a], [a], reading(("regression", 1))))


def test_anchors_are_found_again_with_class_and_place() -> None:
    boxes = torch.tensor([[10.0, 10, 20, 20]] * 5).T[None].repeat(N, 1, 1)  # corners, (n, 4, anchors)
    scores = torch.zeros(N, 2, 5)
    scores[:, 0, :4] = 0.8  # four confident anchors an image
    other_boxes, other = boxes.clone(), scores.clone()
    other[:, :, 0] = torch.tensor([0.3, 0.1])  # a score of less than half
    other[:, :, 1] = torch.tensor([0.5, 0.6])  # another class
    other_boxes[:, :, 2] += 9  # elsewhere
    other[:, 0, 3] = 0.5  # found: half the score and more
    read = OutputReading([
        Leaf("output[0:4]", "boxes", 1, (0, 4), source="0"), Leaf("output[4:6]", "scores", 1, (4, 6), True, source="0"),
    ])  # fmt: skip
    (found,) = figures([torch.cat([boxes, scores], 1)], [torch.cat([other_boxes, other], 1)], read)
    assert (found.name, found.metric, found.value) == ("0", "found", 0.25) and found.interval == wilson(0.25, 4 * N)


def test_what_is_found_again_does_not_depend_on_batches() -> None:
    """Images without a confident anchor count nowhere, whatever else is in their batch; where there is none at all, the surest
    of every image does."""
    read = OutputReading([
        Leaf("output[0:4]", "boxes", 1, (0, 4), source="0"), Leaf("output[4:6]", "scores", 1, (4, 6), True, source="0"),
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    boxes = torch.cat([torch.rand(N, 2, 5, generator=generator), 2 + torch.rand(N, 2, 5, generator=generator)], 1)
    scores = 0.2 * torch.rand(N, 2, 5, generator=generator)
    confident = scores.clone()
    confident[::3, 0, 1] = 0.9
    for ours in (scores, confident):
        other = ours.clone()
        other[::2] = ours[::2].flip(1)  # every other image with the other class
        first, second = torch.cat([boxes, ours], 1), torch.cat([boxes, other], 1)
        found = [figures([first], [second], read, size)[0] for size in (1, 4, N)]
        assert found[0] == found[1] == found[2] and found[0].images == N and found[0].value == 0.5


def test_detections_are_found_again_in_any_order() -> None:
    def image(*found: tuple[float, int, float]) -> dict[str, Tensor]:
        left, labels, scores = zip(*found, strict=True)
        x = torch.tensor(left)
        return {"boxes": torch.stack([x, x, x + 10, x + 10], 1), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}

    ours, theirs = image((0, 1, 0.9), (50, 2, 0.5), (99, 1, 0.2)), image((51, 2, 0.3), (1, 2, 0.9))
    found = figure_of_detections([(ours, theirs), (ours, ours)])
    assert found.value == 3 / 4 and found.images == 2
    nothing = figure_of_detections([(image((0, 1, 0.1)), ours)])
    assert math.isnan(nothing.value) and nothing.to_dict()["value"] is None
    json.dumps(nothing.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("text", "metric", "value"),
    [("agreement 99%", "agreement", 0.99), ("99%", "agreement", 0.99), ("0.97", "agreement", 0.97), ("psnr 40", "psnr", 40.0),
     ("psnr 40 dB", "psnr", 40.0), ("cosine .99", "cosine", 0.99), ("error 2%", "error", 0.02), ("IoU=95%", "iou", 0.95)],
)  # fmt: skip
def test_targets(text: str, metric: str, value: float) -> None:
    target = parse_target(text)
    assert (target.metric, target.value) == (metric, pytest.approx(value))


@pytest.mark.parametrize(
    "text", ["", "agreement", "agreement 120%", "psnr 40%", "psnr 0", "cosine 2", "error -1", "agrement 9%", "100%"]
)
def test_targets_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(SharefoldError, match="keep"):
        parse_target(text)


def test_a_target_is_met_by_what_is_promised() -> None:
    def figure(metric: str, low: float, high: float) -> Figure:
        return Figure("x", "y", metric, (low + high) / 2, (low, high), 10)

    assert parse_target("agreement 99%").met([figure("agreement", 0.991, 1.0)])
    assert not parse_target("agreement 99%").met([figure("agreement", 0.989, 1.0)])
    assert not parse_target("cosine .9").met([figure("cosine", 0.95, 0.99), figure("cosine", 0.8, 0.99)])
    assert parse_target("error 2%").met([figure("error", 0.01, 0.02)])
    assert not parse_target("error 2%").met([figure("error", 0.01, 0.021)])
    with pytest.raises(SharefoldError, match="no psnr to keep: there is agreement"):
        parse_target("psnr 40").met([figure("agreement", 1.0, 1.0)])
    assert parse_target("agreement 99%").images == 381 and parse_target("psnr 40").images == 1
