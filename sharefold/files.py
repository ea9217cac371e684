"""Writing without half-written results: everything goes to a temporary name beside the target and is renamed.

A kill at any moment leaves the old output or the new one under its name. What a killed process left beside it
(``.NAME.HOST-PID.tmp``) is removed by the next one that writes to that name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from sharefold.errors import SharefoldError
from sharefold.exchange import exchange
from sharefold.ownership import check_names, check_no_part, is_own_folder, take_over
from sharefold.untrusted import expanded, shown

_HOST = re.sub(r"[^A-Za-z0-9]", "", platform.node())[:16]
_DAY = 86_400
_NUMBERS, _MINE = itertools.count(), set[Path]()  # of this process, whose number another one may have had before


def check_output(
    path: str | Path, force: bool = False, files: Iterable[str] = (), networks: Iterable[str] = ()
) -> Path:  # fmt: skip
    """The path, after checking before any work that it can be written.

    Args:
        files, networks: names of files, and of folders of networks, that are to be in it, if it is a folder.

    Raises:
        SharefoldError: it exists and ``force`` is not set, its folder is missing or not writable, ``force`` would replace
            something that sharefold did not write, or it is a part of what sharefold wrote as a whole.
    """
    target = Path(path)
    try:
        place = _place(target)
        if not place.parent.is_dir():
            raise SharefoldError(f"output {target}: folder {place.parent} does not exist: create it first")
        check_no_part(place, target)
        probe = _beside(place, "tmp")  # a real write: permission bits say yes to root, and nothing of read-only or full disks
        probe.mkdir(exist_ok=True)
        probe.rmdir()
        there, is_folder = target.exists(), target.is_dir()
    except OSError as error:
        raise SharefoldError(f"output {_told(target)} cannot be written ({error.strerror}): choose another place") from None
    if there:
        if not force:
            raise SharefoldError(f"output {target} exists: pass --force to replace it, or choose another name")
        if is_folder and any(target.iterdir()) and not is_own_folder(target):
            raise SharefoldError(f"output {target} is a folder that sharefold did not write: choose another name")
        check_names(target, files, networks)
    return target


def check_apart(output: Path, source: str | Path) -> None:
    """Refuses to write over what is read, by whatever name.

    Raises:
        SharefoldError: ``output`` and ``source`` are one file.
    """
    with contextlib.suppress(OSError, ValueError):  # one of them is not there
        if output.samefile(expanded(str(source))):
            raise SharefoldError(f"output {output} is the network {source} itself: choose another name")


def check_path(path: Path) -> None:
    """Refuses what cannot be the name of a file, whether there is one or not.

    Raises:
        SharefoldError: too long, a link that leads to itself, or with a NUL in it.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise SharefoldError(f"{shown(str(path))} is no name of a file ({error.strerror}): check the path") from None
    except ValueError:
        raise SharefoldError(f"{shown(str(path))} is no name of a file (a NUL in it): check the path") from None


def _place(path: Path) -> Path:
    """Where ``path`` is, links followed.

    Raises:
        OSError: a link that leads to itself, or a name that is too long.
    """
    with contextlib.suppress(FileNotFoundError):
        path.stat()
    return Path(os.path.realpath(path))


def write_buffered(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """As :func:`write_file`, of what ``write`` puts into memory: when the disk is full, torch's own writer ends the process."""
    memory = io.BytesIO()
    write(memory)
    write_file(path, lambda temporary: temporary.write_bytes(memory.getbuffer()))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path in the same folder, then renames the result to ``path``.

    Raises:
        SharefoldError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    try:
        target = _place(path)
    except OSError as error:
        raise _unwritten(path, error) from None
    temporary = _beside(target, "tmp")
    _clean(target)
    try:
        write(temporary)
        _publish(temporary)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        os.replace(temporary, target)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise _unwritten(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary folder beside ``path``, then puts it in the place of ``path`` in one step.

    Files in the folder at ``path`` that sharefold did not write are taken over.

    Raises:
        SharefoldError: as :func:`write_file`, or one of those files has the name of a new one.
    """
    try:
        target = _place(path)
    except OSError as error:
        raise _unwritten(path, error) from None
    temporary = _beside(target, "tmp")
    _clean(target)
    try:
        temporary.mkdir()
        try:
            write(temporary)
        except SharefoldError as error:  # of a file in it, by a name that the user never gave
            if str(temporary) not in str(error):
                raise
            raise SharefoldError(str(error).replace(str(temporary), str(path))) from None
        _publish(temporary)
        if target.is_dir():
            take_over(target, temporary, path)
            _sync(temporary)
        _put(temporary, target)
        if temporary.is_dir() and target.is_dir():  # written into the old folder while this went on
            take_over(temporary, target, path, late=True)
        _sync(target.parent)
    except (OSError, SafetensorError, shutil.Error) as error:
        raise _unwritten(path, error) from None
    finally:
        _remove(temporary)


def _unwritten(path: Path, error: Exception) -> SharefoldError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return SharefoldError(f"output {_told(path)} could not be written: {reason}: free some space, or choose another place")


def _told(path: Path) -> str:
    return shown(str(path)) if len(path.name) > 255 else str(path)


def _put(temporary: Path, target: Path) -> None:
    """Gives ``temporary`` the name ``target``; what had that name is under the other one afterwards, or gone."""
    for _ in range(100):  # other processes may write to the same name
        if os.path.lexists(target) and exchange(temporary, target):
            return
        if not os.path.lexists(target) or not target.is_dir():
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)
                os.rename(temporary, target)
                return
            continue
        # No exchange on this system: two renames, and `_clean` puts the old folder back if this process dies between them.
        old = _beside(target, "old")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            if not os.path.lexists(target):
                os.rename(old, target)
            raise
        os.rename(old, temporary)
        return
    raise OSError(errno.EBUSY, "another process keeps writing there")


def _publish(path: Path) -> None:
    """Everything under ``path`` on the disk, with the permissions that a plain ``open`` or ``mkdir`` would have given:
    safetensors makes its files private."""
    mask = os.umask(0)
    os.umask(mask)
    for part in (*(sorted(path.rglob("*"), reverse=True) if path.is_dir() else ()), path):
        part.chmod((0o777 if part.is_dir() else 0o666) & ~mask)
        _sync(part)


def _sync(path: Path) -> None:
    """Waits until ``path`` is on the disk; file systems without such a thing are no reason to fail."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(handle)


def _beside(target: Path, end: str) -> Path:
    made = target.parent / f".{_short(target.name)}.{_HOST}-{os.getpid()}-{next(_NUMBERS)}.{end}"
    _MINE.add(made)
    return made


def _short(name: str) -> str:
    """A name that leaves room for what :func:`_beside` adds: most file systems take 255 bytes."""
    if len(os.fsencode(name)) <= 160:
        return name
    return f"{name[:36]}-{zlib.crc32(os.fsencode(name)):08x}"


def _clean(target: Path) -> None:
    """Removes what dead processes left beside ``target``; an old folder whose place is empty goes back there."""
    pattern = re.compile(rf"\.{re.escape(_short(target.name))}\.(?:(\w*)-)?(\d+)(?:-\d+)?\.(tmp|old)")
    try:
        entries = sorted(target.parent.iterdir())
    except OSError:
        return
    for entry in entries:
        match = pattern.fullmatch(entry.name)
        if match is None or not _is_dead(entry, match[1], int(match[2])):
            continue
        with contextlib.suppress(OSError):
            if match[3] == "old" and not os.path.lexists(target):
                os.rename(entry, target)
            else:
                _remove(entry)


def _is_dead(entry: Path, host: str | None, process: int) -> bool:
    """Whether the process that made ``entry`` is gone; of other machines' processes only the age is known."""
    if process == os.getpid() and host in (None, _HOST):
        return entry not in _MINE
    if host not in (None, _HOST):
        with contextlib.suppress(OSError):
            return time.time() - entry.lstat().st_mtime > _DAY
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
