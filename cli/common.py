"""What every verb shares: its options, its way of speaking, its device and seed."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldWarning
from sharefold.untrusted import printable

from .boundary import debugging

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from sharefold.plans import Progress

# The C++ side logs what the user can do nothing about (NNPACK on an unknown CPU); set before anything imports torch.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# Threads that wait for each other sleep. By default they spin, and where other programs use the cores too, a conversion by two
# threads took eight times the CPU seconds of one by one thread (benchmarks/threads.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PIPE_WIDTH = 200  # columns where no terminal says otherwise: a table in a file should not be cut


@dataclass
class Run:
    """One run of a verb. Human text goes to stdout, or to stderr under ``--json``; progress always to stderr."""

    json: bool = False
    seed: int = 0
    device: str = "auto"
    quiet: bool = False
    threads: int | None = None
    _stdout: IO[str] = field(default_factory=lambda: sys.stdout)

    def setup(self) -> torch.device:
        """Import torch, apply ``--threads`` and ``--seed``, and give the device.

        Raises:
            SharefoldError: no such device here.
        """
        import torch

        from sharefold.running import usable_device

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        name = self.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return usable_device(name, "--device cpu")

    def say(self, text: str = "") -> None:
        """A line for people; names in it may come from anybody."""
        if not self.quiet:
            click.echo(printable(text), err=self.json)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """A table for people; columns whose cells are all numbers stand to the right."""
        if self.quiet:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        heading = None if title is None else Text(printable(title))
        table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        cells = [[_cell(value) for value in row] for row in rows]
        for index, name in enumerate(head):
            numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
            table.add_column(Text(printable(name)), justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console_on(sys.stderr if self.json else sys.stdout).print(table)

    def result(self, data: Mapping[str, Any]) -> None:
        """The one JSON object on stdout; silent without ``--json``."""
        if self.json:
            self._stdout.write(json.dumps(jsonable(data), indent=2, allow_nan=False) + "\n")
            self._stdout.flush()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A callback (what, done, total): live bars on a terminal, a line a finished step elsewhere."""
        console = console_on(sys.stderr)
        if self.quiet:
            yield lambda what, done, total: None
        elif console.is_terminal and "NO_COLOR" not in os.environ:
            with _bars(console) as report:
                yield report
        else:
            yield _step_lines()


def console_on(stream: IO[str]) -> Console:
    """A rich console without any escape code where ``stream`` is no terminal or NO_COLOR is set."""
    from rich.console import Console

    terminal = stream.isatty()
    plain = not terminal or "NO_COLOR" in os.environ
    return Console(
        file=stream,
        color_system=None if plain else "auto",
        force_terminal=terminal,
        width=None if terminal else PIPE_WIDTH,
        highlight=False,
        markup=False,
    )


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, transient=True) as bars:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(printable(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _step_lines() -> Progress:
    started: dict[str, float] = {}

    def report(what: str, done: int, total: int) -> None:
        begin = started.setdefault(what, time.perf_counter())
        if done >= total:
            click.echo(f"{printable(what)}: {done} of {total}, {time.perf_counter() - begin:.1f} s", err=True)
            del started[what]

    return report


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return printable(str(value))


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "").rstrip("%") or "0")
    except ValueError:
        return False
    return True


def jsonable(value: Any) -> Any:
    """Plain JSON values: tuples as lists, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    return str(value)


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds ``--json --seed --device --quiet --threads``; the function gets a :class:`Run` first."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone on stdout.")
    @click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of everything random.")
    @click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1; auto takes a GPU if any.")
    @click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's choice]")
    @click.option("-q", "--quiet", is_flag=True, help="No tables, no progress.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, as_json: bool, seed: int, device: str, threads: int | None, quiet: bool, **kwargs: Any
    ) -> None:
        run = Run(as_json, seed, device, quiet, threads)
        with ExitStack() as stack:
            if as_json:  # whatever a library prints, stdout carries the object alone
                stack.enter_context(redirect_stdout(sys.stderr))
            stack.enter_context(_calm_libraries(quiet))
            function(run, *args, **kwargs)

    return wrapper


@contextmanager
def _calm_libraries(quiet: bool) -> Iterator[None]:
    """sharefold's own warnings as ``warning: ...``; those of libraries only when debugging."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if not quiet or not issubclass(category, SharefoldWarning):
            click.echo(printable(f"warning: {message}"), err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        if not debugging():
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        warnings.simplefilter("default", SharefoldWarning)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
