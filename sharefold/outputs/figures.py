"""One figure for people an output: what its kind is judged by, of two networks on the same images, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.outputs import leaf as kinds
from sharefold.outputs.divergence import Divergence
from sharefold.outputs.figure import Figure
from sharefold.outputs.found_again import anchors_found, figure_of_anchors
from sharefold.outputs.intervals import of_mean, of_shares
from sharefold.outputs.leaf import Leaf, rows
from sharefold.outputs.reading import OutputReading
from sharefold.outputs.taps import Tap
from sharefold.outputs.terms import Term, as_numbers

MOST_DB = 200.0  # of images without any difference


class Figures:
    """Counts batch by batch.

    Args:
        reading: of the original.
        divergence: whose variances relative errors are over.
    """

    def __init__(self, reading: OutputReading, divergence: Divergence) -> None:
        self.reading = reading
        self.images = 0
        self._boxes = {leaf.source: index for index, leaf in enumerate(reading.leaves) if leaf.kind == kinds.BOXES}
        self._scores = {leaf.source: index for index, leaf in enumerate(reading.leaves) if leaf.kind == kinds.SCORES}
        pairs = zip(reading.leaves, divergence.terms, strict=True)
        self._counts = [_Error(leaf, term) if reading.taps else _count_of(leaf, term) for leaf, term in pairs]
        self._found: dict[str, list[Tensor]] = {name: [] for name in self._boxes if name in self._scores}

    def add(self, original: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Answers of both networks for a batch, one tensor (n, ...) a leaf."""
        self.images += len(original[0])
        for count, a, b in zip(self._counts, original, other, strict=True):
            count.add(a, b.to(a.device))
        for name, counted in self._found.items():
            leaves = self.reading.leaves
            here, there = (
                [_last(leaves[i], answers[i]) for i in (self._boxes[name], self._scores[name])] for answers in (original, other)
            )
            for scores, leaf in ((here, leaves[self._scores[name]]), (there, leaves[self._scores[name]])):
                scores[1] = scores[1].float() if leaf.activated else scores[1].float().sigmoid()
            counted.append(anchors_found(*here, *there))

    def results(self) -> list[Figure]:
        """The figures, outputs in order; boxes and scores of one tensor are one figure."""
        found = [figure_of_anchors(name, torch.cat(counted)) for name, counted in self._found.items()]
        if self.reading.taps:
            return found + [self._of_tap(tap) for tap in self.reading.taps]
        for leaf, count in zip(self.reading.leaves, self._counts, strict=True):
            if leaf.source not in self._found or leaf.kind not in (kinds.BOXES, kinds.SCORES):
                found += count.figures()
        return found

    def _of_tap(self, tap: Tap) -> Figure:
        """All that a module gives in one figure: the root of the mean divergence."""
        parts = [torch.cat(c.found) for c in self._counts if tap.covers(c.leaf.source)]
        return error_figure(tap.name, kinds.REGRESSION, torch.stack(parts).mean(0))


def _last(leaf: Leaf, tensor: Tensor) -> Tensor:
    """(n, anchors, channels)."""
    return tensor.movedim(leaf.axis or 1, -1)


class _Count:
    """One leaf's values an image."""

    metric = ""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        self.found: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        self.found.append(self.of(a, b).double().cpu())

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        """(n,) of a batch."""
        raise NotImplementedError

    def figures(self) -> list[Figure]:
        values = torch.cat(self.found)
        return [self.figure(self.metric, float(values.mean()), self.interval(values), len(values))]

    def interval(self, values: Tensor) -> tuple[float, float]:
        return of_mean(values)

    def figure(self, metric: str, value: float, interval: tuple[float, float], images: int) -> Figure:
        return Figure(self.leaf.name, self.leaf.kind, metric, value, interval, images)


class _Same(_Count):
    """The share of decisions that are the same: classes, or whole numbers."""

    metric = "agreement"
    each = 1

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        first, second = self.decided(a), self.decided(b)
        self.each = max(1, first[0].numel())
        return ((first == second) & ~self.missing(b)).reshape(len(a), -1).double().mean(1)

    def decided(self, values: Tensor) -> Tensor:
        return values if self.leaf.kind == kinds.LABELS else rows(values, self.leaf.axis or 1).argmax(-1)

    def missing(self, values: Tensor) -> Tensor:
        """Where NaN stands in the place of a decision."""
        return values.isnan() if self.leaf.kind == kinds.LABELS else rows(values, self.leaf.axis or 1).isnan().any(-1)

    def interval(self, values: Tensor) -> tuple[float, float]:
        return of_shares(values, self.each)


class _YesNo(_Same):
    """Decisions at one half, and of maps the IoU of what both networks call yes."""

    metric = "decisions"

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(leaf)
        self.overlap: list[Tensor] = []

    def decided(self, values: Tensor) -> Tensor:
        return values > (0.5 if self.leaf.activated else 0.0)

    def missing(self, values: Tensor) -> Tensor:
        return values.isnan()

    def add(self, a: Tensor, b: Tensor) -> None:
        super().add(a, b)
        if a.ndim > 2:
            first, second = (self.decided(x).flatten(1) for x in (a, b))
            both, either = (first & second).sum(1), (first | second).sum(1)
            self.overlap.append(torch.stack([both, either], 1).double().cpu())

    def figures(self) -> list[Figure]:
        found = super().figures()
        if self.overlap:
            both, either = torch.cat(self.overlap).unbind(1)
            some = either > 0  # neither says yes anywhere: nothing to overlap
            each = both[some] / either[some]
            value = float(each.mean()) if len(each) else math.nan
            interval = tuple(min(1.0, max(0.0, x)) for x in of_mean(each)) if len(each) else (0.0, 1.0)
            found.append(self.figure("iou", value, (interval[0], interval[1]), len(both)))
        return found


class _Image(_Count):
    """PSNR of the mean squared error.

    The peak is 1 for values from about 0 to 1, else what an image of the original's spans in the mean: what all of them span
    together grows with their number.
    """

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(leaf)
        self.low, self.high = math.inf, -math.inf
        self.spans: list[Tensor] = []

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        low, high = as_numbers(a).flatten(1).aminmax(dim=1)
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        self.spans.append((high - low).double().cpu())
        return _no_nan((as_numbers(a) - as_numbers(b)).square().flatten(1).double().mean(1))

    def figures(self) -> list[Figure]:
        values = torch.cat(self.found)
        shares = self.low >= -0.25 and self.high <= 1.25 and self.high - self.low >= 0.5
        peak = 1.0 if shares else max(float(torch.cat(self.spans).mean()), 1e-12)
        low, high = of_mean(values)
        numbers = [_db(x, peak) for x in (float(values.mean()), high, low)]
        return [self.figure("psnr", numbers[0], (numbers[1], numbers[2]), len(values))]


def _no_nan(squares: Tensor) -> Tensor:
    """Squared errors, infinite where a network says what is no number."""
    return squares.nan_to_num(nan=math.inf, posinf=math.inf)


def _db(square: float, peak: float) -> float:
    if not math.isfinite(square):
        return -math.inf
    return MOST_DB if square <= 0 else min(MOST_DB, 10 * math.log10(peak * peak / square))


class _Embedding(_Count):
    """The cosine of the angle between both vectors, mean over images (and positions)."""

    metric = "cosine"

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        axis = self.leaf.axis or 1
        found = F.cosine_similarity(a.float(), b.float(), dim=axis).nan_to_num(nan=-1.0)
        return found.reshape(len(a), -1).double().mean(1)


class _Error(_Count):
    """The root of the squared error over the variance."""

    def __init__(self, leaf: Leaf, term: Term) -> None:
        super().__init__(leaf)
        self.term = term

    def of(self, a: Tensor, b: Tensor) -> Tensor:
        return _no_nan(self.term.per_image(a, b))

    def figures(self) -> list[Figure]:
        return [error_figure(self.leaf.name, self.leaf.kind, torch.cat(self.found))]


def error_figure(name: str, kind: str, squares: Tensor) -> Figure:
    """Of squared errors over the variance (n,), an image each."""
    low, high = of_mean(squares)
    numbers = [math.sqrt(max(0.0, x)) if math.isfinite(x) else math.inf for x in (float(squares.mean()), low, high)]
    return Figure(name, kind, "error", numbers[0], (numbers[1], numbers[2]), len(squares))


def _count_of(leaf: Leaf, term: Term) -> _Count:
    if leaf.kind in (*kinds.CLASSES, kinds.LABELS):
        return _Same(leaf)
    if leaf.kind in kinds.YES_NO:
        return _YesNo(leaf)
    if leaf.kind == kinds.IMAGE:
        return _Image(leaf)
    if leaf.kind == kinds.EMBEDDING:
        return _Embedding(leaf)
    return _Error(leaf, term)


def metrics_of(reading: OutputReading) -> list[str]:
    """Of the figures that two networks of this reading have."""
    if reading.taps:
        return ["error", "found"] if reading.detections else ["error"]
    pairs = {leaf.source for leaf in reading.leaves if leaf.kind == kinds.BOXES}
    pairs &= {leaf.source for leaf in reading.leaves if leaf.kind == kinds.SCORES}
    found = {"found"} if pairs else set()
    for leaf in reading.leaves:
        if leaf.source not in pairs or leaf.kind not in (kinds.BOXES, kinds.SCORES):
            found.add(next((metric for metric, of in _METRICS.items() if leaf.kind in of), "error"))
            found |= {"iou"} if leaf.kind in kinds.YES_NO else set()
    return sorted(found)


_METRICS: dict[str, tuple[str, ...]] = {
    "agreement": (*kinds.CLASSES, kinds.LABELS), "decisions": kinds.YES_NO, "psnr": (kinds.IMAGE,), "cosine": (kinds.EMBEDDING,),
}  # fmt: skip


def figure_of_criterion(per_image: Tensor) -> Figure:
    """Of the user's own criterion (n,)."""
    return Figure("criterion", "criterion", "criterion", float(per_image.mean()), of_mean(per_image), len(per_image))
