"""Mild views speak for new images only where the network itself knows them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sharefold import calibrate
from sharefold.calibration.new_images import recognised, stand_ins
from sharefold.convert import reported
from sharefold.repair import refine

SIDE = 16


class Pattern(nn.Module):
    """Which of two patterns an image is nearer to."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, SIDE, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.stack([first, second]).unsqueeze(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(1)


class Fragile(Pattern):
    """What it says changes with every small change of the image."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.sin(100 * super().forward(images))


def waves(kind: type[Pattern]) -> Pattern:
    """Of a wave from top to bottom and its negative; mirroring changes neither."""
    wave = torch.cos(2 * math.pi * torch.arange(SIDE) / SIDE).expand(SIDE, SIDE).T
    return kind(wave, -wave).eval()


def images_of(net: Pattern, count: int = 240) -> Tensor:
    """Its patterns, with noise on them."""
    generator = torch.Generator().manual_seed(3)
    which = torch.randint(0, 2, (count,), generator=generator)
    return net.conv.weight.detach()[which] + 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)


@pytest.mark.parametrize(("kind", "known"), [(Pattern, True), (Fragile, False)])
def test_views_are_known_where_they_leave_the_class(kind: type[Pattern], known: bool) -> None:
    net = waves(kind)
    shown = images_of(net)
    assert recognised(net, shown, shown) and recognised(net, shown, stand_ins(shown)) == known


@pytest.mark.parametrize(("kind", "known"), [(Pattern, True), (Fragile, False)])
def test_nothing_is_forecast_by_views_that_the_network_does_not_know(kind: type[Pattern], known: bool) -> None:
    net = waves(kind)
    found = reported(net, calibrate(net, images_of(net), outputs="logits"))
    assert found["agreement"] == 1.0 and found["report_images"] == 50
    assert ("new_agreement" in found) == known == ("seen_before" in found)


def sides() -> Pattern:
    """Tells what is bright on the left from what is bright on the right: as with letters, the one is the other's mirror image."""
    bright = torch.linspace(1, -1, SIDE).expand(SIDE, SIDE)
    return Pattern(bright, -bright).eval()


def test_images_are_mirrored_only_where_the_network_says_the_same_of_them() -> None:
    for net, mirrors in ((sides(), False), (waves(Pattern), True)):
        cal = calibrate(net, images_of(net), outputs="logits")
        assert cal.mirrors == mirrors
        assert recognised(net, cal.decide_images, cal.decide_views[-len(cal.decide_images) :])
        assert recognised(net, cal.report_images, cal.stand_ins.images)
        generator = torch.Generator().manual_seed(0)
        views = refine._views(cal.fit_images, cal, 0.0, generator)
        assert recognised(net, cal.fit_images, views)


def test_masks_are_mirrored_whatever_their_classes() -> None:
    """A class a position cannot be compared with that of a mirror image: it stands elsewhere."""
    net = nn.Conv2d(1, 2, 3, padding=1)
    assert calibrate(net, torch.randn(20, 1, 8, 8), outputs="logits:axis=1").mirrors
