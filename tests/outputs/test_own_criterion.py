"""A user's criterion is tried on the network's own answers before anything is decided by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, net
from torch import Tensor

import sharefold
from sharefold.errors import SharefoldError

IMAGES = images(24)


def distance(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().mean(1)


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        ("mse", "must be a function of two outputs, not str"),
        (lambda a, b: distance(a, b) * torch.nan, "not finite where both networks say the same"),
        (lambda a, b: -distance(a, b), "grow the further outputs are apart"),
        (lambda a, b: torch.cosine_similarity(a, b), "it must be 0 there"),
        (lambda a, b: 1 + distance(a, b), "it must be 0 there"),
        (lambda a, b: distance(a, b).sum(), "give one number an image"),
        (lambda a, b: 0.5, "it gave float for 4 images"),
    ],
)
def test_what_cannot_decide_is_refused(criterion: Any, words: str) -> None:
    model = net()
    with pytest.raises(SharefoldError, match=words) as error:
        sharefold.calibrate(model, IMAGES, criterion=criterion)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "criterion", [distance, lambda a, b: (a.argmax(1) != b.argmax(1)).float(), lambda a, b: 1 - torch.cosine_similarity(a, b)]
)
@pytest.mark.parametrize("count", [1, 3, 24])
def test_what_can_is_taken(criterion: Callable[[Tensor, Tensor], Tensor], count: int) -> None:
    assert sharefold.calibrate(net(), IMAGES[:count], criterion=criterion).comparable
