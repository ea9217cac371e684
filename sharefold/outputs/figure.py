"""A figure for people, and what a user may ask of one: ``agreement 99%``, ``psnr 40``, ``cosine .99``, ``error 2%``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sharefold.errors import SharefoldError, unknown
from sharefold.outputs.intervals import trials_needed
from sharefold.untrusted import is_int, is_number

# Metric -> (whether more is better, whether it is a share, what it is).
METRICS: dict[str, tuple[bool, bool, str]] = {
    "agreement": (True, True, "predicted classes that are the same"),
    "decisions": (True, True, "yes or no at 0.5 that is the same"),
    "iou": (True, True, "what both call yes over what either does"),
    "psnr": (True, False, "dB between the two images"),
    "cosine": (True, False, "of the angle between the two vectors"),
    "found": (True, True, "the original's confident boxes that are found again, with class and IoU of at least 0.5"),
    "error": (False, True, "root of the squared error over the variance"),
    "criterion": (False, False, "the given criterion, mean over images"),
}


@dataclass(frozen=True)
class Figure:
    """What two networks have in common in one output.

    Attributes:
        name: of the output.
        kind: of its numbers.
        metric: one of :data:`METRICS`.
        value: the figure; NaN where the images have nothing to tell it by.
        interval: 95 %, (low, high).
        images: how many it is of.
    """

    name: str
    kind: str
    metric: str
    value: float
    interval: tuple[float, float]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, null for what is not finite."""
        numbers = [x if math.isfinite(x) else None for x in (self.value, *self.interval)]
        return {
            "name": self.name, "kind": self.kind, "metric": self.metric, "value": numbers[0], "interval": numbers[1:],
            "images": self.images,
        }  # fmt: skip

    def text(self) -> str:
        """``99.50% (98.20% to 99.86%)``."""
        low, high = (_number(self.metric, x) for x in self.interval)
        return f"{_number(self.metric, self.value)} ({low} to {high})"


def told_figures(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What a file's metrics say of each output, for people: ``{"psnr of output": "39.6 dB (39.4 dB to 39.8 dB) on 50 images"}``.

    What is no figure is left out, and agreement, which has an entry of its own among the metrics.
    """
    found = {}
    for entry in metrics["outputs"] if isinstance(metrics.get("outputs"), list) else ():
        figure = _figure_of(entry)
        if figure is not None and (figure.metric != "agreement" or "agreement_interval" not in metrics):
            found[f"{figure.metric} of {figure.name}"] = f"{figure.text()} on {figure.images} images"
    return found


def _figure_of(entry: Any) -> Figure | None:
    """The figure of a :meth:`Figure.to_dict`; None of anything else."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("interval"), list) or len(entry["interval"]) != 2:
        return None
    texts = [text for key in ("name", "kind", "metric") if isinstance(text := entry.get(key), str)]
    numbers, images = [entry.get("value"), *entry["interval"]], entry.get("images")
    if len(texts) < 3 or texts[2] not in METRICS or not is_int(images):
        return None
    if not all(number is None or is_number(number) for number in numbers):
        return None
    value, low, high = (math.nan if number is None else float(number) for number in numbers)
    return Figure(texts[0], texts[1], texts[2], value, (low, high), int(images or 0))


def _number(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if metric == "psnr":
        return f"{value:.2f} dB"
    return f"{value:.2%}" if METRICS[metric][1] else f"{value:.4f}"


@dataclass(frozen=True)
class Target:
    """What a conversion shall keep.

    Attributes:
        metric: one of :data:`METRICS`.
        value: a share of 1 for shares, dB for psnr.
        text: as the user wrote it.
        proven: judged by the end of the interval that promises least; else by the figure itself.
    """

    metric: str
    value: float
    text: str
    proven: bool = True

    def met(self, figures: Sequence[Figure]) -> bool:
        """Whether every figure of the metric reaches it.

        Raises:
            SharefoldError: no output has such a figure; says which there are.
        """
        meant = self.of(figures)
        if METRICS[self.metric][0]:
            return all((figure.interval[0] if self.proven else figure.value) >= self.value for figure in meant)
        return all((figure.interval[1] if self.proven else figure.value) <= self.value for figure in meant)

    def of(self, figures: Sequence[Figure]) -> list[Figure]:
        """The figures that are meant.

        Raises:
            SharefoldError: there is none.
        """
        meant = [figure for figure in figures if figure.metric == self.metric and not math.isnan(figure.value)]
        if not meant:
            self.check([figure.metric for figure in figures if figure.metric != self.metric])
            raise SharefoldError(f"--keep {self.text}: the images have nothing to tell it by: give others with --calib")
        return meant

    def check(self, metrics: Iterable[str]) -> None:
        """Checks that the metric is among these.

        Raises:
            SharefoldError: it is not; says which there are.
        """
        there = sorted(set(metrics))
        if self.metric not in there:
            text = ", ".join(there) or "nothing to compare"
            raise SharefoldError(f"--keep {self.text}: this network has no {self.metric} to keep: there is {text}")

    @property
    def images(self) -> int:
        """How many images can prove it at best: all of them right. 1 where the number of images has no say in it."""
        return trials_needed(self.value) if self.metric == "agreement" else 1


def parse_target(text: str) -> Target:
    """``agreement 99%``, ``psnr 40``, ``cosine .99``, ``error 2%``; a share alone is one of agreement.

    Raises:
        SharefoldError: another form, an unknown metric, a value that cannot be.
    """
    known = [metric for metric in METRICS if metric != "criterion"]
    match = re.fullmatch(r"\s*(?:([a-zA-Z]+)[\s:=]*)?(\d*\.?\d+)\s*(%|dB)?\s*", text)
    if match is None:
        raise SharefoldError(f"--keep {text!r}: write metric and value: agreement 99%, psnr 40, cosine .99, error 2%")
    metric = (match[1] or "agreement").lower()
    if metric not in known:
        raise unknown("metric to keep", metric, known)
    value = float(match[2]) / (100 if match[3] == "%" else 1)
    if metric == "psnr":
        if match[3] == "%" or value <= 0:
            raise SharefoldError(f"--keep {text!r}: psnr is in dB, above 0, such as psnr 40")
    elif not 0 < value <= 1 or match[3] == "dB":
        raise SharefoldError(f"--keep {text!r}: must be above 0 and at most {'1' if metric == 'cosine' else '100%'}")
    elif value == 1 and METRICS[metric][1] and METRICS[metric][0]:
        raise SharefoldError(f"--keep {text!r}: no number of images proves 100%: ask for less")
    return Target(metric, value, text.strip())
