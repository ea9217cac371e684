"""Two networks compared batch by batch: as on all images at once, whatever the batches; and what cannot be compared."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import pytest
import torch
from networks import Mute, images, net
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.outputs import Comparison
from sharefold.outputs.streamed import compared


def disturbed(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.2)
    return other


class Two(nn.Module):
    """Logits and a grey image."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = net()
        self.conv = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.classifier(x), "image": self.conv(x).clamp(0, 1)}


@pytest.mark.parametrize("make", [net, Two])
@pytest.mark.parametrize("size", [7, 40])
def test_figures_are_those_of_all_images_at_once(make: type[nn.Module], size: int) -> None:
    original, batch = make(), images(40)
    other, seen = disturbed(original), []
    found = compared(original, other, batch.split(size), progress=seen.append)
    whole, figures = Comparison(original, batch).measure(other)
    assert found.images == 40 and seen[-1] == 40 and len(seen) == -(-40 // size)
    assert found.divergence == pytest.approx(whole.mean, rel=1e-4) and whole.mean > 0
    assert [(one.name, one.metric) for one in found.figures] == [(one.name, one.metric) for one in figures]
    for one, wanted in zip(found.figures, figures, strict=True):
        assert one.value == pytest.approx(wanted.value, rel=1e-4) and one.interval == pytest.approx(wanted.interval, rel=1e-4)


def test_only_the_first_images_are_held() -> None:
    """The 256 that tell what outputs are, until they have run; the others come one batch at a time."""
    original, made, held = net(), [], []

    def batches() -> Iterator[Tensor]:
        for index in range(8):
            batch = images(64, seed=index)
            made.append(weakref.ref(batch))
            yield batch
            del batch

    found = compared(original, original, batches(), progress=lambda _: held.append(sum(ref() is not None for ref in made)))
    assert held[0] == 4 and held[3] <= 2 and max(held[4:]) <= 2, held
    assert found.divergence == pytest.approx(0, abs=1e-9) and found.figures[0].value == 1.0 and found.images == 512


class Detector(nn.Module):
    """As torchvision's: a dictionary an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()
        self.eval()

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        corners = torch.tensor([0.0, 0.0, 4.0, 4.0])
        return [
            {"boxes": corners.repeat(len(row), 1) + row[:, None], "scores": row.sigmoid(), "labels": torch.arange(len(row))}
            for row in self.body(x)
        ]


def test_boxes_are_found_again() -> None:
    original = Detector()
    (_, found) = compared(original, disturbed(original), images(6).split(3)).figures
    (_, wanted) = Comparison(original, images(6)).figures(disturbed(original))
    assert (found.name, found.metric, found.images, found.value) == ("detections", "found", 6, wanted.value)


def test_refusals() -> None:
    with pytest.raises(SharefoldError, match="no images"):
        compared(net(), net(), [])
    with pytest.raises(SharefoldError, match="nothing by which .*: say what it returns"):
        compared(Mute(net()), Mute(net()), [images(2)])
    other = net()
    other.fc = nn.Linear(other.fc.in_features, 3)  # type: ignore[arg-type]
    with pytest.raises(SharefoldError, match="cannot be compared: .* against .*: compare networks of the same outputs"):
        compared(net(), other, [images(2)])
