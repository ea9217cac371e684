"""Two networks side by side in one call: how often they decide the same, and their divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.inputs import Tensors, taken
from sharefold.outputs.comparison import BATCH, Comparison
from sharefold.outputs.figure import Figure
from sharefold.outputs.reading import OutputReading
from sharefold.running import check_values, random_kept


class Agreement(NamedTuple):
    """How much two networks say the same on the same images."""

    top1: float  # fraction of predicted classes that coincide; NaN for networks that predict none
    kl: float  # mean KL(a || b) in nats of a classifier; of all others the divergence of all outputs


def agreement(
    a: nn.Module, b: nn.Module, images: Tensors, *, batch_size: int = BATCH, reading: OutputReading | None = None
) -> Agreement:
    """Agreement of ``b`` with ``a`` and its divergence from it over ``images`` (n, C, H, W) normalised float, or a tuple
    of tensors (n, ...).

    All outputs count; of those that are classes, each position is one prediction.

    Args:
        reading: of ``a``; by default read here.

    Raises:
        SharefoldError: no images, tensors without values, nothing to compare, or outputs of other shapes.
    """
    given = taken(images)
    if len(given) == 0:
        raise SharefoldError("agreement: no images given")
    for name, network in (("a", a), ("b", b)):
        check_values(network, f"agreement: {name}")
    with random_kept(a, b):
        comparison = Comparison(a, given, reading, batch_size=batch_size)
        found, figures = comparison.measure(b)
    return Agreement(mean_agreement(figures), found.mean)


def mean_agreement(figures: Sequence[Figure]) -> float:
    """Of all outputs that are classes; NaN where none is."""
    found = [figure.value for figure in figures if figure.metric == "agreement"]
    return sum(found) / len(found) if found else math.nan
