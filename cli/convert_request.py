"""What ``sharefold convert`` was asked for, checked before the network is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sharefold.budget import Budget, Effort, parse_budget, parse_effort
from sharefold.errors import SharefoldError
from sharefold.files import check_output
from sharefold.plans import DEFAULT_OBJECTIVE
from sharefold.untrusted import read_text

from .source import SourceOptions

if TYPE_CHECKING:
    from sharefold.plans import Plan

DEFAULT_BUDGET = "50%"


def default_output(source: str) -> Path:
    """``timm:resnet50.a1_in1k:k=v`` and ``models/resnet50.pth`` both give ``resnet50-shared``."""
    kind, colon, rest = source.partition(":")
    name = rest.split(":")[0].split("/")[-1].split(".")[0] if colon and kind in ("timm", "tv", "hf-hub") else ""
    name = name or Path(source).resolve().stem
    return Path(re.sub(r"[^\w.-]+", "-", name).strip("-.") + "-shared")


def read_plan(path: Path) -> Plan:
    """A plan file: what ``Plan.to_json`` wrote, or the JSON of ``convert --dry-run --json``."""
    from sharefold.plans import Plan

    return Plan.from_json(read_text(path, f"plan {path}"), where=f"plan {path}")


@dataclass(frozen=True)
class Request:
    """What the user asked for, checked as far as it can be without touching the network."""

    source: SourceOptions
    output: Path | None
    budget: Budget | None
    keep: float | None
    method: str
    objective: str
    pivots: bool
    plan: Plan | None
    exclude: str | None
    refine: Effort | None
    recipe: str | None
    store: str | None
    repair: bool
    dry_run: bool
    force: bool

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in ``--method a,b``; none for "auto"."""
        return () if self.method == "auto" else tuple(name.strip() for name in self.method.split(","))

    @property
    def decided_by(self) -> str:
        """The ``method`` entry of the JSON."""
        return "plan" if self.plan is not None else "recipe" if self.recipe is not None else self.method


def share_of(text: str | None, option: str) -> float | None:
    """``99%`` or ``0.99`` as a fraction of 1."""
    if text is None:
        return None
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise SharefoldError(f"{option} {text!r} is no share: write 99% or 0.99") from None
    if not 0 < value <= 1:
        raise SharefoldError(f"{option} {text!r}: must be above 0 and at most 100%")
    return value


def check_request(
    source: SourceOptions, output: Path | None, budget: str | None, keep_agreement: str | None, method: str | None,
    objective: str | None, pivots: bool, plan: Path | None, exclude: str | None, refine: str | None, recipe: str | None,
    store: str | None, repair: bool, dry_run: bool, force: bool,
) -> Request:  # fmt: skip
    """Everything that is wrong with the options alone.

    Raises:
        SharefoldError: contradicting options, a malformed budget, share, plan or expression, an output that exists.
    """
    deciders = {
        "--method": method, "--budget": budget, "--keep-agreement": keep_agreement, "--exclude": exclude,
        "--objective": objective, "--no-pivots": None if pivots else True,
    }  # fmt: skip
    idle = [name for name, value in deciders.items() if value is not None]
    if plan is not None and idle:
        raise SharefoldError(f"{idle[0]} has no effect with --plan, which already decides: leave one out")
    if recipe is not None and (plan is not None or idle):
        other = "--plan" if plan is not None else idle[0]
        raise SharefoldError(f"{other} has no effect with --recipe, which already decides: leave one out")
    if budget is not None and keep_agreement is not None:
        raise SharefoldError("--budget and --keep-agreement both decide the size: give one")
    if exclude is not None:
        try:
            re.compile(exclude)
        except re.error as error:
            raise SharefoldError(f"--exclude {exclude!r} is not a regular expression: {error}") from None
    bound = None
    if plan is None and recipe is None and keep_agreement is None:
        bound = parse_budget(DEFAULT_BUDGET if budget is None else budget)
        if bound.unit == "bytes" and store is not None:
            raise SharefoldError(
                f"--budget {bound.text} is the size of the file and chooses its number types: leave --store out, or give "
                "the budget as a share or in parameters"
            )
    if not dry_run:
        output = output or default_output(source.source)
        check_output(output, force)
    return Request(
        source, output, bound, share_of(keep_agreement, "--keep-agreement"), method or "auto", objective or DEFAULT_OBJECTIVE,
        pivots, None if plan is None else read_plan(plan), exclude, parse_effort(refine), recipe, store, repair, dry_run, force,
    )  # fmt: skip
