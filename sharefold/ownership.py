"""Which files in a folder sharefold wrote: what it replaces there, and what is a user's own and stays."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sharefold.errors import SharefoldError

CONFIG_NAME = "sharefold_config.json"  # what tells a directory of sharefold from a user's own
WEIGHTS_NAME, CARD_NAME = "model.safetensors", "README.md"
SWEEP_NAME, DEMO_NAME, DEMO_NETWORK = "sweep.json", "demo.json", "digits-shared"
Names = tuple[str, ...]
NETWORK_FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
_MOST = 1 << 20  # bytes of a sweep's record
_OTHER_FORMATS = (".pt", ".pth", ".th", ".ckpt", ".bin", ".onnx", ".pt2")


@dataclass(frozen=True)
class _Kind:
    """An output that is a folder: the file that tells it, all files in it, and the folders of networks in it."""

    mark: str
    files: Names
    networks: Names = ()


SWEEP_FILES = (SWEEP_NAME, "sweep.csv", "sweep.svg", "sweep.png")
_KINDS = (
    _Kind(CONFIG_NAME, NETWORK_FILES),
    _Kind(SWEEP_NAME, SWEEP_FILES),
    _Kind(DEMO_NAME, (DEMO_NAME, "demo.png"), (DEMO_NETWORK,)),
)


def is_own_folder(folder: Path) -> bool:
    """Whether sharefold wrote something into ``folder``: a network, a sweep or a demonstration."""
    return any((folder / kind.mark).is_file() for kind in _KINDS)


def check_no_part(place: Path, told: Path) -> None:
    """Whether the file ``place``, links followed, can be written without breaking what sharefold wrote around it.

    Args:
        told: what the user calls it.

    Raises:
        SharefoldError: in a folder of sharefold that name is for a part of what lies there.
    """
    if place.name in _own(place.parent)[0]:
        raise SharefoldError(
            f"output {told} is a part of what sharefold wrote into the folder {place.parent}: choose another name, or replace "
            "the whole folder"
        )


def network_files(path: Path) -> Names:
    """The files of a network in the folder ``path``; none where ``path`` is to be a single file.

    Raises:
        SharefoldError: it is called like a file of another format.
    """
    suffix = path.suffix.lower()
    if suffix in _OTHER_FORMATS or suffix == ".safetensors" != path.suffix:
        raise SharefoldError(
            f"output {path}: a network is written as a folder or as a .safetensors file: call it {path.stem}, or "
            f"{path.stem}.safetensors"
        )
    return () if path.suffix == ".safetensors" else NETWORK_FILES


def network_folder(budget: str) -> str:
    """The folder within a sweep's that the network of ``budget`` (a text such as ``25%``) gets."""
    return re.sub(r"[^\w.-]+", "-", budget).strip("-")


def check_names(folder: Path, files: Iterable[str], networks: Iterable[str] = ()) -> None:
    """Whether ``files`` and folders of ``networks`` can be written into ``folder``, if that is there.

    Raises:
        SharefoldError: something that is not of sharefold has one of the names.
    """
    if folder.is_dir():
        _check_names(folder, files, networks, *_own(folder))


def _check_names(folder: Path, files: Iterable[str], networks: Iterable[str], own: Names, own_networks: Names) -> None:
    for name in files:
        if os.path.lexists(folder / name) and not (name in own and _is_file(folder / name)):
            raise clashing(folder / name)
    for name in networks:
        if not os.path.lexists(folder / name):
            continue
        if not _is_folder(folder / name):
            raise clashing(folder / name)
        _check_names(folder / name, NETWORK_FILES, (), NETWORK_FILES if name in own_networks else (), ())


def take_over(old: Path, new: Path, where: Path, late: bool = False) -> None:
    """Links a user's own files in the folder ``old`` into ``new``, which is to have the name ``where``.

    What sharefold wrote into ``old`` is left behind. Folders keep their permissions.

    Args:
        late: ``new`` is in its place already and has what it needs of ``old``: other files of the same name stay as they are.

    Raises:
        SharefoldError: a file or folder of the user has the name of one in ``new``.
    """
    _take_over(old, new, *_own(old), where, late)
    _copy_mode(old, new)


def _take_over(old: Path, new: Path, files: Names, networks: Names, where: Path, late: bool) -> None:
    for entry in sorted(old.iterdir()):
        other = new / entry.name
        if _is_file(entry) and entry.name in files:
            continue
        if not _is_folder(entry):
            if not os.path.lexists(other):
                _link(entry, other)
            elif not late:
                raise clashing(where / entry.name)
            continue
        if os.path.lexists(other) and not _is_folder(other):
            if not late:
                raise clashing(where / entry.name)
            continue
        made = not other.exists()
        other.mkdir(exist_ok=True)
        own = NETWORK_FILES if entry.name in networks else ()
        _take_over(entry, other, own, (), where / entry.name, late)
        if made and own and not any(other.iterdir()):  # it held nothing but a network of sharefold
            other.rmdir()
        else:
            _copy_mode(entry, other)


def clashing(path: Path) -> SharefoldError:
    """What a user hears whose file has the name of one that is to be written."""
    return SharefoldError(f"output {path} is there and not of sharefold: move it away, or choose another name for the output")


def _own(folder: Path) -> tuple[Names, Names]:
    """Names of the files in ``folder`` that are of sharefold, and of folders with its networks."""
    files: Names = ()
    networks: Names = ()
    for kind in _KINDS:
        if (folder / kind.mark).is_file():
            files += kind.files
            networks += kind.networks + (_swept(folder / kind.mark) if kind.mark == SWEEP_NAME else ())
    return files, networks


def _swept(record: Path) -> Names:
    """The folders of networks that a sweep's record names; those of a damaged record are nobody's, and stay."""
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        with record.open("rb") as stream:
            found = json.loads(stream.read(_MOST))
        names = found.get("networks")
        if names is None:  # an older sharefold: by the budgets
            names = [network_folder(point["budget"]) for point in found["points"][1:]]
        return tuple(name for name in names if isinstance(name, str) and name)
    return ()


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode) or (path.is_symlink() and not path.is_dir())


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
        return
    try:
        os.link(source, target)
    except OSError:  # no hard links on this file system
        shutil.copy2(source, target)


def _copy_mode(old: Path, new: Path) -> None:
    mode = stat.S_IMODE(old.stat().st_mode)
    if mode & stat.S_IRWXU == stat.S_IRWXU:  # an early sharefold made folders that nobody could enter
        new.chmod(mode)
