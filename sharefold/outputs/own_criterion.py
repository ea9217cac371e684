"""A user's own measure of how far apart two networks' outputs are: asked for numbers that can decide, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input
from sharefold.running import run_on

# (what the original returns, what another network returns) for one batch -> (n,), 0 where both say the same.
Criterion = Callable[[Any, Any], Tensor]

FEW = 4
# What two equal outputs may be apart, as a share of what outputs of different images are.
NEARLY_SAME = 0.01


def per_image(criterion: Criterion, original: Any, other: Any, images: int) -> Tensor:
    """(n,) float64 on the CPU of a batch of ``images``; what is no number counts as infinitely far.

    Raises:
        SharefoldError: it gives something else than a number an image.
    """
    found = criterion(original, other)
    if not isinstance(found, Tensor) or found.shape != (images,):
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise SharefoldError(f"criterion: it gave {what} for {images} images: give one number an image, a tensor ({images},)")
    return found.detach().double().cpu().nan_to_num(nan=math.inf, posinf=math.inf)


def check_criterion(criterion: Criterion, model: nn.Module, images: Input) -> None:
    """Tries ``criterion`` on what ``model``, which is left as it was, says of a few of ``images``.

    Raises:
        SharefoldError: it cannot be called, or says of equal outputs that they are apart: a similarity, or no numbers.
    """
    if not callable(criterion):
        raise SharefoldError(f"criterion: must be a function of two outputs, not {type(criterion).__name__}")
    count = min(FEW, len(images))
    with preserved(model):
        first, last = run_on(model, images[:count]), run_on(model, images[len(images) - count :])
        same, apart = (float(per_image(criterion, first, other, count).mean()) for other in (first, last))
    if not math.isfinite(same):
        raise SharefoldError("criterion: it is not finite where both networks say the same: it must be 0 there")
    if apart < same or (apart > same and abs(same) > NEARLY_SAME * apart):
        raise SharefoldError(
            f"criterion: it is {same:.3g} where both networks say the same, and {apart:.3g} for outputs of other images: "
            "it must be 0 there, and grow the further outputs are apart"
        )
