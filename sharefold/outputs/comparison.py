"""Compares any number of networks with one original on the same images; what decides on repairs, budgets and plans."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.inputs import Input
from sharefold.layers.norm_fusion import fused_for_inference
from sharefold.outputs.divergence import Divergence, unmasked
from sharefold.outputs.figures import Figure, Figures, figure_of_criterion
from sharefold.outputs.found_again import figure_of_detections
from sharefold.outputs.leaf import LOGITS, Leaf
from sharefold.outputs.own_criterion import Criterion, per_image
from sharefold.outputs.reading import OutputReading, read_outputs
from sharefold.running import batch_of, evaluating, run_on

CACHE_BYTES = 256 << 20
BATCH = 250
# Rounding of outputs, in units of their type's last digit: sums of many products are no better.
ROUNDING = 4.0


@dataclass(frozen=True)
class Divergences:
    """How far another network is from the original.

    Attributes:
        per_image: (n,) float64.
        leaves: mean of every leaf alone, by name; empty with a criterion of the user's.
    """

    per_image: Tensor
    leaves: dict[str, float]

    @property
    def mean(self) -> float:
        """Nats for a classifier, else in units of what the outputs vary by; what rounding makes of nothing is not below 0."""
        return max(float(self.per_image.mean()), 0.0)


class Comparison:
    """The original's answers to some images, against which others are held.

    Args:
        original: the teacher; run in eval mode, left as it was.
        images: (n, C, H, W) normalised, or several inputs.
        reading: of ``original``; by default read here, from ``graph`` too where given.
        divergence: measured elsewhere, on more images; by default on these.
        criterion: (original's outputs, outputs) of a batch -> (n,), 0 where they are equal, in place of the divergence.
        batch_size: images a run, fewer where they are large.
        cache_bytes: of the original's answers that stay in memory; what is beyond is computed again.
        norms: for every layer the norm that alone reads its output, which then runs within the layer; by default none does.

    Raises:
        SharefoldError: no images, or nothing to compare and no criterion.
    """

    def __init__(
        self, original: nn.Module, images: Input, reading: OutputReading | None = None, *,
        divergence: Divergence | None = None, criterion: Criterion | None = None, graph: NetworkGraph | None = None,
        batch_size: int = BATCH, cache_bytes: int = CACHE_BYTES, norms: Mapping[str, str | None] | None = None,
    ) -> None:  # fmt: skip
        if len(images) == 0:
            raise SharefoldError("outputs: there are no images to compare networks on: give at least one")
        self.original, self.images, self.criterion = original, images, criterion
        self.reading = read_outputs(original, images, graph) if reading is None else reading
        if not self.reading.comparable and criterion is None:
            raise SharefoldError("outputs: this network returns nothing by which two of them can be compared: give a criterion")
        self.batches = list(images.split(batch_of(images, batch_size)))
        self.norms = {} if norms is None or self.reading.taps else norms  # taps may look at what is in front of a norm
        self.cache_bytes = cache_bytes
        self._kept: dict[int, tuple[Any, list[Tensor]]] = {}
        self._bytes = 0
        self._divergence = divergence

    @property
    def measured(self) -> Divergence:
        """The divergence that networks are compared by where there is no criterion."""
        if self._divergence is None:
            with self._running():
                self._divergence = Divergence(self.reading, (self._answers(i)[1] for i in range(len(self.batches))))
        return self._divergence

    @contextmanager
    def _running(self, *models: nn.Module) -> Iterator[None]:
        """The original and others in eval mode, as they run fastest."""
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.original, *models))
            if self.norms:
                stack.enter_context(fused_for_inference(self.original, *models, norms=self.norms))
            yield

    def _answers(self, index: int) -> tuple[Any, list[Tensor]]:
        """What the original returns for a batch (None where nothing asks for it) and its leaves."""
        if index in self._kept:
            return self._kept[index]
        raw, leaves = self.reading.run_raw(self.original, self.batches[index])
        wanted = self.criterion is not None or self.reading.detections
        # Views of what the network owns would change with it.
        found = (raw if wanted else None), [leaf.clone() for leaf in leaves]
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        if not wanted and self._bytes + size <= self.cache_bytes:
            self._bytes += size
            self._kept[index] = found
        return found

    def answers(self, model: nn.Module) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """What the original and ``model`` say, leaf by leaf in the order of the reading, batch by batch; both in eval mode."""
        with self._running(model):
            for _, theirs, _, ours in self._pairs(model):
                yield theirs, ours

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Any, list[Tensor], Any, list[Tensor]]]:
        """(raw, leaves) of the original and of ``model``, batch by batch; both in eval mode."""
        for index, batch in enumerate(self.batches):
            raw, leaves = self._answers(index)
            yield raw, leaves, *self.reading.run_raw(model, batch)

    def divergence(self, model: nn.Module) -> Divergences:
        """Of ``model`` from the original; infinite where it says something that is not finite.

        Raises:
            SharefoldError: outputs of other shapes, or a criterion that gives no row of numbers.
        """
        with self._running(model):
            return self._between(self._pairs(model))

    def _between(self, pairs: Iterator[tuple[Any, list[Tensor], Any, list[Tensor]]]) -> Divergences:
        if self.criterion is not None:
            found = [
                per_image(self.criterion, a, b, len(n)) for (a, _, b, _), n in zip(pairs, self.batches, strict=True)
            ]  # fmt: skip
            return Divergences(torch.cat(found), {})
        return self.of_answers((a, b) for _, a, _, b in pairs)

    def of_answers(self, pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> Divergences:
        """Of a network from the original by what both say, leaf by leaf, batch by batch; not by a criterion of the user's.

        Raises:
            SharefoldError: outputs of other shapes.
        """
        each = torch.cat([self.measured.each(a, b) for a, b in pairs], 1)
        names, means = [leaf.name for leaf in self.reading.leaves], each.mean(1).tolist()
        return Divergences(self.measured.total(each), dict(zip(names, means, strict=True)))

    @cached_property
    def noise(self) -> float:
        """The divergence of the original from itself with the rounding of its outputs' type, in the mean."""
        if self.criterion is not None:
            return torch.finfo(torch.float32).eps
        with self._running():
            leaves = self._answers(0)[1]
        generator = torch.Generator().manual_seed(0)
        moved = [_rounded(*pair, generator) for pair in zip(self.reading.leaves, leaves, strict=True)]
        exact = [leaf.float() if leaf.is_floating_point() else leaf for leaf in leaves]
        return float(self.measured.total(self.measured.each(exact, moved).abs()).mean())

    def ties(self, a: Divergences | float, b: Divergences | float) -> bool:
        """Whether two divergences differ by no more than rounding: that is no reason to prefer one.

        They are quadratic in the difference of outputs: an error e on top of a difference d makes (d + e)^2 of d^2.
        """
        first, second = (one.mean if isinstance(one, Divergences) else float(one) for one in (a, b))
        if not (math.isfinite(first) and math.isfinite(second)):
            return first == second
        larger = max(abs(first), abs(second))
        return abs(first - second) <= 2 * math.sqrt(larger * self.noise) + self.noise

    def better(self, after: Divergences | float, before: Divergences | float) -> bool:
        """Whether ``after`` is clearly lower than ``before``, and finite."""
        first, second = (one.mean if isinstance(one, Divergences) else float(one) for one in (after, before))
        return first < second and math.isfinite(first) and not self.ties(first, second)

    def measure(self, model: nn.Module) -> tuple[Divergences, list[Figure]]:
        """Divergence and the figures for people, by one run of ``model``."""
        counted = Figures(self.reading, self.measured) if self.reading.comparable else None

        def watched() -> Iterator[tuple[Any, list[Tensor], Any, list[Tensor]]]:
            for pair in self._pairs(model):
                if counted is not None:
                    counted.add(pair[1], pair[3])
                yield pair

        with self._running(model):
            found = self._between(watched())
        figures = counted.results() if counted is not None else []
        if self.reading.detections:
            figures += self._found_again(model)
        if self.criterion is not None:
            figures.append(figure_of_criterion(found.per_image))
        return found, figures

    def figures(self, model: nn.Module) -> list[Figure]:
        """One figure an output, with a 95 % interval."""
        return self.measure(model)[1]

    def _found_again(self, model: nn.Module) -> list[Figure]:
        """Of detectors whose results vary in number: what they return in the end, without the taps' common regions."""
        with evaluating(self.original, model):
            pairs = [(run_on(self.original, batch), run_on(model, batch)) for batch in self.batches]
        return [figure_of_detections([(a, b) for first, second in pairs for a, b in zip(first, second, strict=True)])]


def _rounded(leaf: Leaf, answers: Tensor, generator: torch.Generator) -> Tensor:
    """``answers`` with an error of a few last digits of their type, relative to their size; float32."""
    if not answers.is_floating_point():
        return answers
    exact = answers.float()
    shown = unmasked(exact, leaf.axis or 1) if leaf.kind == LOGITS else None
    size = (exact if shown is None else exact[shown]).square().mean().sqrt()
    noise = torch.randn(exact.shape, generator=generator).to(exact)
    return exact + ROUNDING * torch.finfo(answers.dtype).eps * size * noise

