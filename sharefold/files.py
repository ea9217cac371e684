"""Writing without half-written results: everything goes to a temporary name beside the target and is renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sharefold.errors import SharefoldError

CONFIG_NAME = "sharefold_config.json"  # what tells a directory of sharefold from a user's own


def check_output(path: str | Path, force: bool = False) -> Path:
    """The path, after checking before any work that it can be written.

    Raises:
        SharefoldError: it exists and ``force`` is not set, its folder is missing or not writable, or ``force`` would
            delete something that sharefold did not write.
    """
    target = Path(path)
    parent = target.resolve().parent
    if not parent.is_dir():
        raise SharefoldError(f"output {target}: folder {parent} does not exist: create it first")
    try:  # a real write: permission bits say yes to root, and nothing of read-only or full disks
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=parent):
            pass
    except OSError as error:
        raise SharefoldError(f"output {target} cannot be written ({error.strerror}): choose another place") from None
    if target.exists():
        if not force:
            raise SharefoldError(f"output {target} exists: pass --force to replace it, or choose another name")
        if target.is_dir() and any(target.iterdir()) and not (target / CONFIG_NAME).exists():
            raise SharefoldError(f"output {target} is a folder that sharefold did not write: choose another name")
    return target


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path in the same folder, then renames the result to ``path``.

    Raises:
        SharefoldError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    temporary = path.resolve().parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        write(temporary)
        _publish(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise SharefoldError(f"output {path} could not be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary folder beside ``path``, then moves it into place; an old folder goes last.

    Raises:
        SharefoldError: as :func:`write_file`.
    """
    parent = path.resolve().parent
    temporary, old = (parent / f".{path.name}.{os.getpid()}.{end}" for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.iterdir():
            _publish(file)
        if path.is_dir():
            os.replace(path, old)
        elif path.exists():
            path.unlink()
        os.replace(temporary, path)
    except OSError as error:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise SharefoldError(f"output {path} could not be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _publish(path: Path) -> None:
    """The permissions that a plain ``open`` would have given; safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
