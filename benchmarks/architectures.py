"""A table with a row for each registered architecture: each made in a process of its own, written one by one."""

from __future__ import annotations

import csv
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

FAILED = ("failed", "timeout")  # how reasons begin that are none
AnyRow = TypeVar("AnyRow", bound=Any)  # a dataclass with library, family, model, seconds and reason


def guarded(job: Callable[[AnyRow], AnyRow], row: AnyRow, seconds: float) -> AnyRow:
    """``job(row)`` in a process of its own, ended after ``seconds``; how that process ends becomes the reason."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, job, row))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            row = receiver.recv()
        else:
            row.reason, row.seconds = f"timeout: not done after {seconds:g} s", seconds
    except EOFError:
        process.join()
        code = process.exitcode or 0
        row.reason = f"failed: killed by {signal.Signals(-code).name}" if code < 0 else f"failed: exit code {code}"
    finally:
        process.kill()
        process.join()
    return row


def _child(sender: Connection, job: Callable[[AnyRow], AnyRow], row: AnyRow) -> None:
    sender.send(job(row))


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of an earlier run by (library, model)."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(row["library"], row["model"]): row for row in csv.DictReader(file)}


def missing(rows: Sequence[AnyRow], path: Path, again: str | None = None) -> list[AnyRow]:
    """Those of ``rows`` that have no line at ``path``; with ``again`` also the ``failed`` ones (and timeouts), or ``all``."""
    known = {} if again == "all" else read(path)
    if again == "failed":
        known = {key: line for key, line in known.items() if not line["reason"].startswith(FAILED)}
    return [row for row in rows if (row.library, row.model) not in known]


def record(path: Path, row: AnyRow) -> None:
    """Adds or replaces one row; the file is whole at every moment, also with several shards writing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = read(path)
        rows[row.library, row.model] = {k: "" if v is None else str(v) for k, v in asdict(row).items()}
        temporary = path.with_suffix(f".{os.getpid()}")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted(rows.values(), key=lambda r: (r["library"], r["family"], r["model"])))
        temporary.replace(path)
    finally:
        os.close(lock)
