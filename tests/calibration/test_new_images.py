"""Views that stand for new images, and whether a network has seen the images before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sharefold.calibration.new_images import SURER, VIEWS, doubt, seen_before, stand_ins


class Memory(nn.Module):
    """Certain of the images that it was given, to within a little; of all else it says the same with less certainty."""

    def __init__(self, known: Tensor, surer: float) -> None:
        super().__init__()
        self.known, self.surer = known.flatten(1), surer

    def forward(self, x: Tensor) -> Tensor:
        apart = torch.cdist(x.flatten(1), self.known, compute_mode="donot_use_mm_for_euclid_dist")
        near = apart.amin(1) < 1e-3
        wrong = torch.where(near, 0.1 / self.surer, torch.tensor(0.1))
        return torch.stack([1 - wrong, wrong], 1).log()


def images() -> Tensor:
    return torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_views_are_near_and_drawn_by_the_seed_alone() -> None:
    smooth = torch.nn.functional.interpolate(images()[:, :, :3, :3], 24, mode="bicubic")
    views = stand_ins(smooth, 3)
    assert views.shape == (VIEWS * 40, 3, 24, 24)
    assert torch.equal(views, stand_ins(smooth, 3)) and not torch.equal(views, stand_ins(smooth, 4))
    both = smooth.repeat(VIEWS, 1, 1, 1)
    apart = torch.minimum((views - both).flatten(1).norm(dim=1), (views - both.flip(3)).flatten(1).norm(dim=1))
    share = apart / both.flatten(1).norm(dim=1)
    assert 0.02 < float(share.mean()) < 0.35  # another picture would be 1.4 away


def test_doubt_is_what_the_best_class_leaves() -> None:
    model = Memory(images()[:30], surer=10.0)
    assert doubt(model, images()) == pytest.approx((30 * 0.01 + 10 * 0.1) / 40, rel=1e-5)


@pytest.mark.parametrize(("surer", "found"), [(SURER * 1.2, True), (SURER / 1.2, False), (1.0, False)])
def test_seen_before_where_views_are_much_less_certain(surer: float, found: bool) -> None:
    assert seen_before(Memory(images(), surer), images(), stand_ins(images())) == found
