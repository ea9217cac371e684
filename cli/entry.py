"""Where the installed script begins: quiet when interrupted while Python is still importing."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: the system then ends the process without a traceback


def main() -> None:
    """The command line; interrupted, it says so in one line (exit code 130)."""
    from .main import cli

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cli(prog_name="sharefold")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
