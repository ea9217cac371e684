"""What is fitted, what decides and what is reported: no image in two parts, and none read for another purpose."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from networks import Chain
from torch import Tensor, nn

import sharefold
from sharefold.calibration.new_images import stand_ins
from sharefold.calibration.parts import images_for, parts_of
from sharefold.measure import agreement
from sharefold.outputs.intervals import trials_needed, wilson


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(3, (3, 3, 0)), (5, (4, 1, 0)), (64, (54, 10, 0)), (199, (169, 30, 0)), (200, (120, 30, 50)), (1000, (700, 150, 150)),
     (2000, (1400, 300, 300)), (10_000, (8000, 1500, 500))],
)  # fmt: skip
def test_sizes_and_that_no_image_is_in_two_parts(count: int, sizes: tuple[int, int, int]) -> None:
    parts = parts_of(count, seed=7)
    found = (parts.fit, parts.decide, parts.report)
    assert tuple(map(len, found)) == sizes
    assert all(torch.equal(part, part.sort().values) for part in found)
    if count >= 5:
        assert torch.cat(found).sort().values.tolist() == list(range(count))


def test_the_seed_alone_draws_them() -> None:
    first, again, other = parts_of(500, 1), parts_of(500, 1), parts_of(500, 2)
    assert torch.equal(first.report, again.report) and torch.equal(first.fit, again.fit)
    assert not torch.equal(first.report, other.report) and not torch.equal(first.decide, other.decide)


def test_larger_held_out_parts_on_request() -> None:
    parts = parts_of(3000, held_out=760)
    assert (len(parts.fit), len(parts.decide), len(parts.report)) == (1480, 760, 760)
    parts = parts_of(1000, held_out=760)  # at most 30 % each
    assert (len(parts.fit), len(parts.decide), len(parts.report)) == (400, 300, 300)
    assert len(parts_of(images_for(381), held_out=381).report) >= 381 > len(parts_of(images_for(381) - 4, held_out=381).report)
    assert images_for(1) == 200


def test_intervals() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)
    assert trials_needed(0.99) == 381 and wilson(1.0, 381)[0] >= 0.99 > wilson(1.0, 380)[0]


def net() -> nn.Module:
    torch.manual_seed(0)
    return Chain(3).eval()


def images(seed: int = 3) -> Tensor:
    return torch.randn(240, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def converted(given: Tensor, **options: object) -> tuple[nn.Module, sharefold.Conversion]:
    model = net()
    cal = sharefold.calibrate(model, given)
    plan = sharefold.plan(model, "50%", cal, objective=options.pop("objective", "fisher"))
    plan.store = options.pop("store", None)
    return model, sharefold.convert_(model, plan, cal, **options)


def replaced(part: str) -> Tensor:
    """The images, other ones in the place of a part."""
    found = images()
    index = getattr(parts_of(len(found)), part)
    found[index] = images(4)[index] * 3
    return found


@pytest.mark.parametrize("options", [{"objective": "joint"}, {"refine": 1}, {"store": "int4"}])
def test_nothing_but_the_figures_depends_on_the_images_of_the_report(options: dict[str, object]) -> None:
    (first, one), (second, two) = converted(images(), **options), converted(replaced("report"), **options)
    assert one.plan.to_dict() == two.plan.to_dict() and one.kl != two.kl
    assert {n: r.kl_after for n, r in one.steps.items()} == {n: r.kl_after for n, r in two.steps.items()}
    mine, theirs = first.state_dict(), second.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_what_is_solved_and_rounded_does_not_depend_on_the_images_that_decide() -> None:
    """But for the scale of the logits, a number."""
    plan = sharefold.plan(net(), "50%", sharefold.calibrate(net(), images()), method=("basis", "svd"))
    plan.store = "int4"

    def converted(given: Tensor) -> tuple[nn.Module, sharefold.Conversion]:
        model = net()
        return model, sharefold.convert_(model, plan, sharefold.calibrate(model, given), repair=False)

    (first, _), (second, _) = (converted(x) for x in (images(), replaced("decide")))
    mine, theirs = first.state_dict(), second.state_dict()
    last = [name for name in mine if name.startswith("head.")]
    assert last and mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine if name not in last)
    for name in last:
        factor = float(theirs[name].norm() / mine[name].norm())
        assert torch.allclose(theirs[name], factor * mine[name], rtol=1e-3) and 0.8 < factor < 1.25
    third, _ = converted(replaced("fit"))
    assert any(not torch.equal(mine[name], tensor) for name, tensor in third.state_dict().items() if name in mine)


def test_the_figures_are_those_of_the_report() -> None:
    model, done = converted(images())
    wanted = images()[parts_of(240).report]
    found = agreement(net(), model, wanted)
    assert done.report_images == 50 and done.agreement == found.top1 and done.kl == pytest.approx(found.kl, rel=1e-4, abs=1e-7)
    assert done.agreement_interval == wilson(found.top1, 50)
    new = agreement(net(), model, stand_ins(wanted, 0))
    assert done.new_agreement == new.top1 and done.new_agreement_interval == wilson(new.top1, 50)


def test_few_images_report_nothing() -> None:
    _, done = converted(images()[:199])
    assert math.isnan(done.agreement) and done.agreement_interval is None and math.isnan(done.kl) and done.report_images == 0


def test_the_parts_of_a_calibration() -> None:
    cal = sharefold.calibrate(net(), images(), seed=5, held_out=70)
    parts = parts_of(240, 5, 70)
    assert len(parts.report) == 70 and torch.equal(cal.report_images, images()[parts.report])
    assert torch.equal(cal.decide_views[:70], images()[parts.decide]) and torch.equal(cal.fit_images, images()[parts.fit])
    assert set(cal.statistics.chosen.tolist()) <= set(parts.fit.tolist())
    assert torch.equal(cal.refit_images, images()[torch.cat([cal.statistics.chosen, cal.parts.decide])])
    assert torch.equal(cal.of(copy.deepcopy(cal.original)).parts.report, parts.report)
