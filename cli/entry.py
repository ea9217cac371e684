"""Where the installed script begins: an interrupt ends it in one line, at whatever moment, with exit code 130."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from types import FrameType

_IMPORT = "<frozen importlib._bootstrap>"

# Imports of torch and timm leave a million objects that the collector would walk through again and again.
COLLECT_AFTER = (10_000, 10, 10)


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, but not within an import: libraries make other errors of it there, or end the process."""
    at = frame
    while at is not None:
        if at.f_code.co_filename == _IMPORT:
            _end()
        at = at.f_back
    raise KeyboardInterrupt


def _end() -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        shown = b"\x1b[?25h" if os.isatty(2) else b""  # progress bars hide the cursor
        os.write(2, shown + b"interrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, _interrupted)


def main() -> None:
    """The command line; interrupted, it says so in one line (exit code 130)."""
    gc.set_threshold(*COLLECT_AFTER)
    try:
        from .main import cli

        cli(prog_name="sharefold")
    except KeyboardInterrupt:
        _end()
    finally:
        gc.freeze()  # the process ends: nothing to collect, which would take most of a second
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what Python still does then is not worth a traceback
