"""What a run tells: JSON lines always, a bar on a terminal, tensorboard and a curve picture when asked or able."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sharefold.errors import SharefoldError
from sharefold.untrusted import is_int, printable


class RunLog:
    """The log of one run. On every process but the first, and without a folder, its parts quietly do nothing.

    Args:
        folder: where ``log.jsonl``, ``curve.png`` and tensorboard's events go, or None.
        show: whether to draw progress and tables on stderr.
    """

    def __init__(self, folder: Path | None, show: bool, tensorboard: bool = False) -> None:
        self.path = folder / "log.jsonl" if folder else None
        self.console = Console(stderr=True, quiet=not show)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._board: Any = None
        self._wants_board = tensorboard

    def open(self, step: int) -> None:
        """Begins at update ``step``: what an earlier session wrote after it is dropped, it will be written again.

        Raises:
            SharefoldError: the folder cannot be made or written.
        """
        if self.path is None:
            return
        kept = [] if step == 0 else [r for r in read_log(self.path) if r["step"] <= step]
        temporary = self.path.with_name(".log.jsonl.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(temporary, self.path)
        except OSError as error:
            raise SharefoldError(f"{self.path}: cannot be written ({error.strerror}): choose another place") from error
        if self._wants_board:
            self._board = _tensorboard(self.path.parent, step)

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line {event, step, ...}; numbers also go to tensorboard as ``event/name``."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{event}/{name}", value, step)

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Shows a bar while active, where stderr is a terminal."""
        if self.console.quiet or not self.console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("fine-tuning", total=total, completed=done)
            yield
        self._bar = None

    def advance(self, done: int, epoch: int, values: dict[str, float] | None = None) -> None:
        if self._bar is None or self._task is None:
            return
        if values:
            top1 = f" top-1 {values['top1']:.1%}" if "top1" in values else ""
            text = f"epoch {epoch + 1} loss {values['loss']:.4f}{top1} {values['images_per_second']:,.0f} img/s"
            self._bar.update(self._task, completed=done, description=text)
        else:
            self._bar.update(self._task, completed=done)

    def say(self, text: str) -> None:
        """One line for the human."""
        self.console.print(printable(text), highlight=False, markup=False)

    def table(self, title: str, head: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SharefoldError("finetune: tensorboard is missing: pip install 'sharefold[train]'") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a ``log.jsonl``; a line that is none is left out, as one that a crash cut off."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_record(record):
            records.append(record)
    return records


def _is_record(value: Any) -> bool:
    """Whether it is a line of :meth:`RunLog.write`: {event, step} and numbers, with ``top1`` where it is of a validation."""
    if not isinstance(value, dict) or not is_int(value.get("step")) or value.get("event") not in ("train", "val"):
        return False
    numbers = [number for name, number in value.items() if name != "event"]
    plain = all(isinstance(n, float) or (is_int(n) and abs(n) < 1 << 53) for n in numbers)
    return plain and (value["event"] == "train" or "top1" in value)


def draw_curve(path: Path, picture: Path) -> bool:
    """Loss and top-1 over updates as a PNG; False when matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_log(path)
    train = [r for r in records if r["event"] == "train"]
    checks = [r for r in records if r["event"] == "val"]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("loss", "labels", "distill", "blocks"):
        if any(name in r for r in train):
            left.plot([r["step"] for r in train if name in r], [r[name] for r in train if name in r], label=name)
    left.set(xlabel="update", ylabel="loss", yscale="log")
    left.legend()
    seen = [r for r in train if "top1" in r]
    right.plot([r["step"] for r in seen], [r["top1"] for r in seen], label="training batches")
    right.plot([r["step"] for r in checks], [r["top1"] for r in checks], "o-", label="validation")
    right.set(xlabel="update", ylabel="top-1")
    if right.get_legend_handles_labels()[0]:
        right.legend()
    temporary = picture.with_name(f".{picture.name}.tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, picture)
    return True
