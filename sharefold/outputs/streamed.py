"""Two networks on any number of images, a batch at a time: a figure for every output."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.inputs import Input, Tensors, joined, taken
from sharefold.options import Outputs
from sharefold.outputs.divergence import IMAGES, Divergence
from sharefold.outputs.figure import Figure
from sharefold.outputs.figures import Figures
from sharefold.outputs.found_again import figure_of_detections
from sharefold.outputs.reading import read_outputs
from sharefold.running import evaluating, run_on


@dataclass(frozen=True)
class Compared:
    """What two networks have in common.

    Attributes:
        figures: one an output, with a 95 % interval.
        divergence: of the other network from the original, mean over images: of a classifier KL(original || other) in nats.
        images: how many they are of.
    """

    figures: list[Figure]
    divergence: float
    images: int


def compared(
    original: nn.Module, other: nn.Module, batches: Iterable[Tensors], outputs: Outputs = None,
    progress: Callable[[int], None] | None = None,
) -> Compared:  # fmt: skip
    """Runs both networks over ``batches``, of which the first that have 256 images together are held until they have run, and of
    all others one at a time.

    Args:
        original, other: in eval mode meanwhile; left as they were.
        batches: images (n, C, H, W), normalised, or tuples of tensors (n, ...). The first 256 tell what the outputs are and how
            much they vary.
        outputs: the user's word on what the outputs are, as for :func:`sharefold.calibrate`.
        progress: called with the number of images done after each batch.

    Raises:
        SharefoldError: no images, nothing to compare, or outputs of two shapes.
    """
    rest = map(taken, batches)
    first = deque(_first(rest, IMAGES))
    if not first:
        raise SharefoldError("outputs: there are no images to compare networks on: give at least one")
    images = joined(list(first))[:IMAGES]
    reading = read_outputs(original, images, None, outputs)
    if not reading.comparable:
        raise SharefoldError(
            "outputs: this network returns nothing by which two of them can be compared: say what it returns (outputs)"
        )
    divergence = Divergence.of(original, reading, images, len(first[0]))
    del images
    counted, total, done = Figures(reading, divergence), 0.0, 0
    pairs: list[tuple[Any, Any]] = []
    with evaluating(original, other):
        for batch in chain(_emptied(first), rest):
            ours, theirs = reading.run(original, batch), reading.run(other, batch)
            counted.add(ours, theirs)
            total += float(divergence.total(divergence.each(ours, theirs)).sum())
            if reading.detections:
                pairs += zip(run_on(original, batch), run_on(other, batch), strict=True)
            done += len(batch)
            if progress is not None:
                progress(done)
    figures = counted.results() + ([figure_of_detections(pairs)] if reading.detections else [])
    return Compared(figures, total / done, done)


def _emptied(batches: deque[Input]) -> Iterator[Input]:
    """``batches``, which then holds them no more."""
    while batches:
        yield batches.popleft()


def _first(batches: Iterator[Input], count: int) -> Iterator[Input]:
    """Batches until they have ``count`` images or more."""
    seen = 0
    while seen < count and (batch := next(batches, None)) is not None:
        seen += len(batch)
        yield batch
