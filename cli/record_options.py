"""Options of the command line made of an options record, so that both say the same."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import Field, fields
from typing import Any, TypeVar

import click

from sharefold.options import PlanOptions

Record = TypeVar("Record")


def record_options(kind: type, *, without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each field of ``kind`` (a record of :mod:`sharefold.options`) that has a text; not given, it is None.

    Args:
        without: names of fields that other options stand for.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for spec in reversed(fields(kind)):
            if "help" in spec.metadata and spec.name not in without:
                function = _option(spec)(function)
        return function

    return decorate


def _option(spec: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    text, default, about = spec.metadata["help"], spec.default, spec.metadata
    name = f"--{spec.name.replace('_', '-')}"
    if about["switch"]:
        return click.option(name, spec.name, is_flag=True, default=None, help=text)
    if isinstance(default, bool):
        shown = f"  [default: {'on' if default else 'off'}]"
        return click.option(f"{name}/--no-{name[2:]}", spec.name, default=None, help=text + shown)
    more: dict[str, Any] = {} if about["alone"] is None else {"is_flag": False, "flag_value": about["alone"]}
    if about["choices"]:
        more["type"] = click.Choice(about["choices"])
    elif about["metavar"] == "N":
        more["type"] = click.IntRange(min=1)
    elif isinstance(default, tuple):
        more["type"] = Numbers()
    elif isinstance(default, int | float):
        more["type"] = type(default)
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else "" if default is None else str(default)
    return click.option(
        name, spec.name, default=None, metavar=about["metavar"], help=text + (f"  [default: {shown}]" if shown else ""), **more
    )


class Numbers(click.ParamType):
    """``0.5,0.5,0.5`` as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)


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
