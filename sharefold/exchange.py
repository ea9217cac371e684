"""Two names change places in one step, where the system can: a folder is never without its name."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h; RENAME_SWAP of macOS is 2 as well


def exchange(first: Path, second: Path) -> bool:
    """Swaps two existing names in one step; False where the system or the file system has no such step."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        one, two = os.fsencode(first), os.fsencode(second)
        if sys.platform == "darwin":
            done = libc.renamex_np(one, two, _RENAME_EXCHANGE)
        else:
            done = libc.renameat2(_AT_FDCWD, one, _AT_FDCWD, two, _RENAME_EXCHANGE)
    except (OSError, AttributeError, TypeError):  # no such function here
        return False
    return done == 0
