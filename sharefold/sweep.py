"""One network at several sizes: what each budget keeps, with everything that does not depend on it done once."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from sharefold.budget import Budget, Budgets, parse_combined
from sharefold.calibration.calibrate import Calibration
from sharefold.convert import Conversion, convert_
from sharefold.errors import SharefoldError
from sharefold.inputs import Input
from sharefold.measure import count_macs, count_parameters, model_bytes
from sharefold.options import ConvertOptions, PlanOptions, chosen
from sharefold.planner import Planner
from sharefold.plans import Progress
from sharefold.report.plots import write_curve
from sharefold.report.svg import curve_chart
from sharefold.running import device_of
from sharefold.settings import with_plain_settings
from sharefold.store import file_bytes
from sharefold.store.tensor_spec import carried_spec


@dataclass(frozen=True)
class Point:
    """One size: ``top1``, ``top5`` and ``agreement`` are fractions of 1; ``seconds`` those of the conversion.

    Agreement, its 95 % interval and KL are those of :class:`sharefold.Conversion`: of ``report_images`` calibration images
    that nothing was fitted or decided on; None where there are too few for that.
    """

    budget: str
    params: int
    share: float
    bytes: int
    macs: int
    top1: float
    top5: float
    loss: float
    agreement: float | None
    agreement_interval: tuple[float, float] | None
    report_images: int
    kl: float | None
    seconds: float


@dataclass(frozen=True)
class SweepOptions:
    """How every size is planned and converted, and ``keep``: called with the budget's text, the network and its metrics."""

    plan: PlanOptions = PlanOptions()
    convert: ConvertOptions = ConvertOptions()
    keep: Callable[[str, nn.Module, dict[str, Any]], None] | None = None


def parse_budgets(text: str | Sequence[str]) -> list[Budgets]:
    """``25%,50%,2M`` as three budgets; with semicolons, what stands between them may be several that hold together:
    ``50%, 70% MACs; 25%``.

    Raises:
        SharefoldError: none, one that is malformed, or one twice.
    """
    given = text.split(";" if ";" in text else ",") if isinstance(text, str) else text
    parts = [part.strip() for part in given if part.strip()]
    if not parts:
        raise SharefoldError("no budgets are given: write for example 25%,50%")
    budgets = [parse_combined(part) for part in parts]
    keys = [{(part.value, part.unit, part.share) for part in budget.parts} for budget in budgets]
    for key, part in zip(keys, parts, strict=True):
        if keys.count(key) > 1:
            raise SharefoldError(f"budget {part!r} is there twice: leave one out")
    return budgets


@with_plain_settings
def sweep(
    cal: Calibration, budgets: Sequence[str | Budget | Budgets], evaluate: Callable[[nn.Module], dict[str, Any]],
    options: SweepOptions | None = None, progress: Progress | None = None, **overrides: Any,
) -> list[Point]:  # fmt: skip
    """Converts the calibrated network to every budget and measures it; the dense network comes first, as budget ``"dense"``.

    All plans are made before the first conversion, so that an unreachable budget costs no conversion.

    Args:
        cal: of the dense network.
        budgets: as :func:`sharefold.budget.parse_combined` reads them.
        evaluate: gives ``top1``, ``top5`` and ``loss``.
        options: see :class:`SweepOptions`; its fields may be given by keyword.

    Raises:
        SharefoldError: as :func:`sharefold.plan`.
    """
    wanted = chosen(options, overrides, SweepOptions)
    bounds = parse_budgets([b if isinstance(b, str) else b.text for b in budgets])
    model, example = cal.original, cal.example
    planner = Planner(cal, wanted.plan)
    plans = [planner.plan(bound) for bound in bounds]
    points = [_point("dense", model, count_parameters(model), evaluate(model), None, 0.0, example)]
    for index, (bound, decided) in enumerate(zip(bounds, plans, strict=True)):
        start = time.perf_counter()
        converted = copy.deepcopy(model)
        done = convert_(converted, decided, cal, wanted.convert)
        seconds = time.perf_counter() - start
        scores = evaluate(converted)
        points.append(_point(bound.text, converted, points[0].params, scores, done, seconds, example))
        if wanted.keep is not None:
            wanted.keep(bound.text, converted, asdict(points[-1]))
        if progress:
            progress("budgets", index + 1, len(bounds))
    return points


def _point(
    budget: str, model: nn.Module, dense: int, scores: dict[str, Any], done: Conversion | None, seconds: float, example: Input
) -> Point:
    agreed = (1.0, None, 0, 0.0) if done is None else _reported(done)
    params = count_parameters(model)
    device = device_of(model)
    return Point(
        budget, params, params / max(dense, 1), _bytes(model), count_macs(model, example.to(device)),
        scores["top1"], scores["top5"], scores["loss"], *agreed, seconds,
    )  # fmt: skip


def _reported(done: Conversion) -> tuple[float | None, tuple[float, float] | None, int, float | None]:
    """Agreement, its interval, the number of images and the divergence; None for what was not measured."""
    agreement, kl = (None if math.isnan(value) else value for value in (done.agreement, done.kl))
    return agreement, done.agreement_interval, done.report_images, kl


def _bytes(model: nn.Module) -> int:
    """Of the file where small number types were chosen for it, else of the tensors in memory."""
    spec = carried_spec(model)
    return model_bytes(model) if spec is None else file_bytes(model, spec)


def to_csv(points: Sequence[Point]) -> str:
    """A table with a header line, one line a point; the interval in two columns."""
    text = io.StringIO()
    names: list[str] = []
    for field in fields(Point):
        names += ["agreement_low", "agreement_high"] if field.name == "agreement_interval" else [field.name]
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for point in points:
        low, high = point.agreement_interval or ("", "")
        writer.writerow({**asdict(point), "agreement_low": low, "agreement_high": high})
    return text.getvalue()


def write_results(folder: Path, points: Sequence[Point], details: dict[str, Any]) -> list[str]:
    """``sweep.csv``, ``sweep.json``, ``sweep.svg`` and, where matplotlib is, ``sweep.png``; gives the names."""
    dense, rest = points[0], sorted(points[1:], key=lambda point: point.params)
    marks = [(float(point.params), point.top1, point.budget) for point in rest]
    (folder / "sweep.csv").write_text(to_csv(points))
    (folder / "sweep.json").write_text(json.dumps({**details, "points": [asdict(p) for p in points]}, indent=2) + "\n")
    (folder / "sweep.svg").write_text(curve_chart(marks, dense.top1, "parameters", "top-1 accuracy"), encoding="utf-8")
    names = ["sweep.csv", "sweep.json", "sweep.svg"]
    if find_spec("matplotlib") is None:  # it is an extra, and the plot is there as SVG
        return names
    write_curve(marks, dense.top1, "top-1 accuracy", folder / "sweep.png")
    return [*names, "sweep.png"]
