"""The results of ``sharefold convert`` as tables and as JSON."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharefold.ownership import WEIGHTS_NAME

from .common import Run
from .convert_request import Request

if TYPE_CHECKING:
    from sharefold.convert import Conversion
    from sharefold.plans import Plan
    from sharefold.repair.step_record import StepRecord


@dataclass
class Timer:
    """Wall-clock seconds of named steps."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def total(self) -> dict[str, float]:
        return {**self.seconds, "total": time.perf_counter() - self.started}


def figures_of(done: Conversion) -> dict[str, Any]:
    """What was measured on the images of the report, as the JSON tells it."""
    return {
        "agreement": done.agreement,
        "agreement_interval": done.agreement_interval,
        "report_images": done.report_images,
        "seen_before": done.seen_before,
        "new_agreement": done.new_agreement,
        "new_agreement_interval": done.new_agreement_interval,
        "kl": done.kl,
        "outputs": [figure.to_dict() for figure in done.outputs],
    }


def weight_file_bytes(output: Path) -> int:
    """Size of the file that holds the tensors."""
    return (output / WEIGHTS_NAME if output.is_dir() else output).stat().st_size


def group_rows(plan: Plan) -> list[dict[str, Any]]:
    """The plan's groups as the JSON of ``convert`` lists them."""
    return [
        {
            "name": group.name,
            "stage": group.stage,
            "role": group.role,
            "method": group.method,
            "members": group.members,
            "rank": group.options.get("rank"),
            "params_before": group.params_before,
            "params_after": group.params_after,
            "error": group.error,
        }
        for group in plan.groups
    ]


def print_plan(run: Run, plan: Plan) -> None:
    """The groups as a table."""
    if not plan.groups:
        run.say("no layer is shared")
        return
    run.table(
        ["group", "method", "layers", "rank", "before", "after", "kept", "error"],
        [
            [row["name"], row["method"], str(len(row["members"])), _rank(group.options), row["params_before"],
             row["params_after"], f"{row['params_after'] / max(row['params_before'], 1):.0%}",
             None if row["error"] is None else f"{row['error']:.4f}"]
            for row, group in zip(group_rows(plan), plan.groups, strict=True)
        ],
    )  # fmt: skip


def print_steps(run: Run, steps: Sequence[StepRecord]) -> None:
    """What each step did as a table, and on which images that was measured."""
    if not steps:
        return
    from sharefold.repair.step_record import measured_on

    run.table(
        ["step", "", "divergence before", "after", ""],
        [[step.name, step.outcome, *step.numbers, step.reason] for step in steps],
    )
    told = measured_on(steps)
    if told:
        run.say(told)


def _rank(options: Mapping[str, Any]) -> Any:
    """The group's rank; of shared and own filters both numbers."""
    return f"{options['rank']} + {options['own']}" if "own" in options else options.get("rank")


def report_plan(run: Run, request: Request, plan: Plan, before: dict[str, int], timer: Timer, memory: int) -> None:
    """The end of ``--dry-run``: nothing was changed, nothing is written."""
    print_plan(run, plan)
    if request.budget is not None:
        run.say(plan.source)
    run.say(f"{plan.params_before:,} -> {plan.params_after:,} parameters ({plan.size:.1%} kept); nothing written")
    run.result(
        {
            "source": request.source.source,
            "method": request.decided_by,
            **request.told,
            "params": {"before": plan.params_before, "after": plan.params_after},
            "bytes": {"before": before["bytes"], "after": None},
            "macs": {"before": before["macs"], "after": None},
            "plan": plan.to_dict(),  # what --plan reads back stands in front of what only tells of it
            "groups": group_rows(plan),
            "agreement": None,
            "agreement_interval": None,
            "report_images": 0,
            "seconds": timer.total(),
            "peak_memory_bytes": memory,
            "output": None,
        }
    )


def report_conversion(
    run: Run, done: Conversion, before: dict[str, int], after: dict[str, int], latency: dict[str, float], output: Path,
    timer: Timer, agreement: str,
) -> None:  # fmt: skip
    """Before and after, for people; ``agreement`` is a sentence."""
    print_plan(run, done.plan)
    kept = {key: f"{after[key] / max(before[key], 1):.1%}" for key in before}
    size = "MB in memory" if done.plan.store else "MB"
    run.table(
        ["", "before", "after", "after / before"],
        [
            ["parameters", before["params"], after["params"], kept["params"]],
            [size, f"{before['bytes'] / 1e6:.3f}", f"{after['bytes'] / 1e6:.3f}", kept["bytes"]],
            ["MMACs", f"{before['macs'] / 1e6:,.1f}", f"{after['macs'] / 1e6:,.1f}", kept["macs"]],
            ["ms an image", f"{1e3 * latency['before']:.2f}", f"{1e3 * latency['after']:.2f}",
             f"{latency['after'] / latency['before']:.1%}"],
        ],
    )
    figures = [[figure.name, figure.kind, figure.metric, figure.text(), str(figure.images)] for figure in done.outputs]
    if figures:
        run.table(["output", "kind", "", "converted to original (95%)", "images"], figures)
    print_steps(run, [*done.steps.values()])
    if done.plan.store:
        run.say(f"stored as {done.plan.store}: {weight_file_bytes(output) / 1e6:.3f} MB of weights in the file")
    run.say(f"{output} written ({timer.total()['total']:.1f} s); {agreement}")
