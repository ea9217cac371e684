"""Options of the command line made of an options record, so that both say the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from sharefold.options import PlanOptions

Record = TypeVar("Record")


def record_options(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each field of ``kind`` (a record of :mod:`sharefold.options`) that has a text; not given, it is None."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for spec in reversed(fields(kind)):
            text, metavar = spec.metadata.get("help"), spec.metadata.get("metavar")
            if text is None:
                continue
            name = spec.name.replace("_", "-")
            if isinstance(spec.default, bool):
                shown = "on" if spec.default else "off"
                option = click.option(f"--{name}/--no-{name}", spec.name, default=None, help=f"{text}  [default: {shown}]")
            else:
                shown = "" if spec.default is None else f"  [default: {spec.default}]"
                alone = spec.metadata["alone"]
                flag: dict[str, Any] = {} if alone is None else {"is_flag": False, "flag_value": alone}
                if metavar == "N":
                    flag["type"] = click.IntRange(min=1)
                option = click.option(f"--{name}", spec.name, default=None, metavar=metavar, help=text + shown, **flag)
            function = option(function)
        return function

    return decorate


def check_choices(what: PlanOptions) -> None:
    """Unknown methods and objectives are refused before the network is read.

    Raises:
        SharefoldError: names the nearest.
    """
    from sharefold.methods import check_method
    from sharefold.planner.objectives import objective_named

    for name in (what.method,) if isinstance(what.method, str) else what.method:
        if name != "auto":
            check_method(name)
    objective_named(what.objective)


def record_of(kind: type[Record], given: dict[str, Any]) -> Record:
    """The record of the options that were given; takes them out of ``given``."""
    names = [spec.name for spec in fields(kind) if "help" in spec.metadata]  # type: ignore[arg-type]
    values = {name: given.pop(name, None) for name in names}
    if isinstance(values.get("method"), str):
        parts = tuple(part.strip() for part in values["method"].split(","))
        values["method"] = parts[0] if len(parts) == 1 else parts
    return kind(**{name: value for name, value in values.items() if value is not None})
