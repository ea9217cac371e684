"""A classifier with more features than there are images to fit it to stays right for classes that are not among them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sharefold
from sharefold.layers import form_of
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import coefficients, refit
from sharefold.repair.lockstep import Visited
from sharefold.repair.samples import Collector, Samples

FEATURES, CLASSES = 96, 10


class Head(nn.Module):
    """Pooled features in, scores out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def features(classes: range, count: int, seed: int) -> Tensor:
    """(count, F, 1, 1) features, clustered by class."""
    means = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(classes.start, classes.stop, (count,), generator=generator)
    return (means[drawn] + 0.5 * torch.randn(count, FEATURES, generator=generator))[..., None, None]


def damaged(x: Tensor) -> Tensor:
    """As a converted prefix gives them: a little turned."""
    turn = torch.eye(FEATURES) + 0.03 * torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(3))
    return torch.einsum("ij,bjhw->bihw", turn, x)


@torch.no_grad()
def samples(original: Head, x: Tensor) -> Samples:
    form = form_of(original.fc)
    assert form is not None
    collector = Collector(form, len(x))
    collector.add(damaged(x).flatten(1), original(x))
    found = collector.samples()
    assert found is not None
    return found


@torch.no_grad()
def error(original: Head, model: Head, x: Tensor) -> float:
    return float((model(damaged(x)) - original(x)).square().mean())


@pytest.mark.parametrize("rank", [CLASSES, 7, 5])
def test_other_classes_keep_their_outputs(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen, unseen = Head().eval(), range(CLASSES // 2), range(CLASSES // 2, CLASSES)
    plan = Plan([GroupPlan("fc", "svd", ("fc",), {"rank": rank})], 0, 0)
    original = sharefold.convert_(model, plan, calibration=features(seen, 72, 0), repair=False).original
    assert isinstance(original, Head)
    fit, decide = (samples(original, features(seen, count, seed)) for count, seed in ((60, 1), (12, 2)))
    known, other = features(seen, 300, 4), features(unseen, 300, 5)
    before = [error(original, model, x) for x in (known, other)]

    def refitted() -> list[float]:
        trial = copy.deepcopy(model)
        refit._visit(Visited(original, trial, "fc", None, fit), fit, decide, plan.groups[0], False)
        return [error(original, trial, x) for x in (known, other)]

    after = refitted()
    assert after[0] < before[0] and after[1] < 1.5 * before[1], (before, after)
    if rank == CLASSES:  # with hardly a pull and by whole steps they would not
        monkeypatch.setattr(coefficients, "RIDGES", (1e-9,))
        monkeypatch.setattr(refit, "best_step", lambda *_: 1.0)
        monkeypatch.setattr(refit, "has_own_factors", lambda *_: False)
        assert refitted()[1] > 1.5 * before[1]
