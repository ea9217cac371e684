"""What ``sharefold convert`` was asked for, checked before the network is touched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharefold.budget import Budgets, parse_combined, parse_effort
from sharefold.errors import SharefoldError
from sharefold.files import check_output
from sharefold.options import ConvertOptions, PlanOptions
from sharefold.ownership import network_files
from sharefold.untrusted import exclude_pattern, read_text

from .record_options import record_of
from .source import SourceOptions

if TYPE_CHECKING:
    from sharefold.outputs import Target
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
    budget: Budgets | None
    keep: Target | None
    outputs: tuple[str, ...]
    what: PlanOptions
    how: ConvertOptions
    plan: Plan | None
    recipe: str | None
    store: str | None
    dry_run: bool
    force: bool

    @property
    def methods(self) -> tuple[str, ...]:
        """Names in ``--method a,b``; none for "auto"."""
        method = self.what.method
        return () if method == "auto" else (method,) if isinstance(method, str) else method

    @property
    def decided_by(self) -> str:
        """The ``method`` entry of the JSON."""
        return "plan" if self.plan is not None else "recipe" if self.recipe is not None else ",".join(self.methods) or "auto"

    @property
    def told(self) -> dict[str, str]:
        """The ``budget`` or ``recipe`` entry of the JSON."""
        found = {"budget": None if self.budget is None else self.budget.text, "recipe": self.recipe}
        return {key: value for key, value in found.items() if value is not None}


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
    source: SourceOptions, output: Path | None, budget: str | None, keep: str | None, keep_agreement: str | None,
    outputs: tuple[str, ...], plan: Path | None, recipe: str | None, store: str | None, dry_run: bool, force: bool,
    **records: Any,
) -> Request:  # fmt: skip
    """Everything that is wrong with the options alone.

    Args:
        records: the options of :class:`PlanOptions` and :class:`ConvertOptions` as they were given.

    Raises:
        SharefoldError: contradicting options, a malformed budget, share, plan or expression, an output that exists.
    """
    deciders = {f"--{name}": records[name] for name in ("method", "exclude", "objective")}
    pivots = None if records["pivots"] is None else True
    deciders |= {"--budget": budget, "--keep": keep, "--keep-agreement": keep_agreement, "--no-pivots": pivots}
    deciders["--round-channels"] = records["round_channels"]
    idle = [name for name, value in deciders.items() if value is not None]
    what, how = record_of(PlanOptions, records), record_of(ConvertOptions, records)
    parse_effort(how.refine)
    if plan is not None and idle:
        raise SharefoldError(f"{idle[0]} has no effect with --plan, which already decides: leave one out")
    if recipe is not None and (plan is not None or idle):
        other = "--plan" if plan is not None else idle[0]
        raise SharefoldError(f"{other} has no effect with --recipe, which already decides: leave one out")
    sizes = [name for name in ("--budget", "--keep", "--keep-agreement") if deciders[name] is not None]
    if len(sizes) > 1:
        raise SharefoldError(f"{sizes[0]} and {sizes[1]} both decide the size: give one")
    exclude_pattern(what.exclude)
    bound = None
    if plan is None and recipe is None and keep is None and keep_agreement is None:
        bound = parse_combined(DEFAULT_BUDGET if budget is None else budget)
        if "bytes" in bound.units and store is not None:
            raise SharefoldError(
                f"--budget {bound.text} bounds the size of the file and chooses its number types: leave --store out, or give "
                "the budget as a share or in parameters"
            )
    if not dry_run:
        output = output or default_output(source.source)
        check_output(output, force, network_files(output))
    read = None if plan is None else read_plan(plan)
    return Request(
        source, output, bound, _target(keep, keep_agreement), outputs, what, how, read, recipe, store, dry_run, force
    )


def _target(keep: str | None, keep_agreement: str | None) -> Target | None:
    """``--keep`` is proven, ``--keep-agreement`` is what the images that decide show."""
    if keep is None and keep_agreement is None:
        return None  # before torch, which the module below needs, is imported
    from sharefold.outputs.figure import Target, parse_target

    if keep is not None:
        return parse_target(keep)
    share = share_of(keep_agreement, "--keep-agreement")
    return None if share is None else Target("agreement", share, f"agreement {keep_agreement}", proven=False)
