"""The one place where exceptions become exit codes: 0 fine, 2 bad input, 1 internal, 130 interrupted."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from sharefold.errors import SharefoldError
from sharefold.untrusted import printable, shown

DEBUG_VARIABLE = "SHAREFOLD_DEBUG"
# What the machine refuses, at whatever place it comes up: no bug of ours.
_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)


def debugging() -> bool:
    """Whether the user asked for tracebacks and library warnings."""
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


class BoundedGroup(click.Group):
    """A click group that ends every run with at most one line on stderr and a meaningful exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
            sys.stdout.flush()  # a closed pipe must show here, not at interpreter shutdown
        except Exception as error:
            _exit(error)
        except KeyboardInterrupt:
            _say("interrupted")
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


def _exit(error: Exception) -> NoReturn:
    if isinstance(error, click.exceptions.Exit):
        sys.exit(error.exit_code)
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        # The reader went away (`| head`). Point stdout elsewhere, or the shutdown flush complains again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)  # as click does when the pipe breaks earlier
    if isinstance(error, click.Abort):
        _say("interrupted")
        sys.exit(130)
    if debugging():
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, click.ClickException):
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see {error.ctx.command_path} --help)"
        _say(f"error: {_one_line(error.format_message()).rstrip('.')}{hint}")
        sys.exit(2)
    if isinstance(error, SharefoldError):
        _say(f"error: {str(error).strip()}")
        sys.exit(2)
    if isinstance(error, OSError) and error.errno in _OUTSIDE:
        where = f": {error.filename}" if error.filename else ""
        _say(f"error: {error.strerror}{where}: free some space, or choose another place")
        sys.exit(2)
    if isinstance(error, OSError) and error.errno in _NO_NAME:
        _say(f"error: {shown(str(error.filename))} is no name of a file ({error.strerror}): check the path")
        sys.exit(2)
    reason = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
    hint = "" if debugging() else f" (set {DEBUG_VARIABLE}=1 for the traceback)"
    _say(f"error: internal: {what}{hint}")
    sys.exit(1)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(text: str) -> None:
    """One line; names from files may hold escapes, which a terminal would obey."""
    click.echo(printable(text), err=True)
