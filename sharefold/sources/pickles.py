"""What a pickle would import, read from its opcodes without running it, and the few harmless imports that are allowed.

``torch.load(weights_only=True)`` builds tensors and plain containers only. Training scripts often store a numpy scalar
(best accuracy) or an ``argparse.Namespace`` (options) beside the weights; :func:`harmless_globals` lets these through.
"""

from __future__ import annotations

import argparse
import datetime
import io
import pathlib
import pickletools
import types
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from sharefold.sources.pickle_sizes import LEGACY_PICKLES, Unclear, check_pickle

_TENSOR_PARTS = frozenset(
    {"collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "torch.Tensor", "_codecs.encode"}
    | {"torch.nn.parameter.Parameter", "torch.serialization._get_layout", "torch._tensor._rebuild_from_type_v2"}
    | {"torch.storage.UntypedStorage", "torch.storage.TypedStorage"}
    | {"builtins.set", "builtins.bytearray", "builtins.complex"}
    | {"__builtin__.set", "__builtin__.bytearray", "__builtin__.complex"}
)
_STRING_OPS = frozenset(
    {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_GET_OPS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_PUT_OPS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})


# In place of a name: behind some byte the pickle cannot be followed.
UNREAD = "(and what cannot be read)"


def harmless_globals() -> list[Any]:
    """Types and functions beyond torch's own list that can neither run code nor touch files when unpickled."""
    # Its name since numpy 2; numpy 1.26 has an empty `_core` beside the old one.
    multiarray = getattr(getattr(np, "_core", None), "multiarray", None) or np.core.multiarray  # type: ignore[attr-defined]
    named: list[Any] = [np.dtype, np.ndarray, argparse.Namespace, types.SimpleNamespace]
    named += [(_plain_dict, "collections.defaultdict")]
    named += [datetime.datetime, datetime.date, datetime.timedelta]
    named += [list, dict, tuple, int, float, bool, str, frozenset]
    # numpy 1 and numpy 2 keep the same functions under different module names; a file may come from either.
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        named += [(multiarray.scalar, f"{module}.scalar")]
        named += [(multiarray._reconstruct, f"{module}._reconstruct")]
    # Dtype classes and scalar types of plain numbers; objects stay out, since they may carry anything.
    for code in "?bBhHiIlLqQefdgFD":
        dtype = np.dtype(code)
        named += [type(dtype), dtype.type]
    # Paths are read as pure ones, which cannot touch the file system and exist on every system.
    for module in ("pathlib", "pathlib._local"):
        named += [(pathlib.PurePosixPath, f"{module}.PosixPath"), (pathlib.PurePosixPath, f"{module}.PurePosixPath")]
        named += [(pathlib.PureWindowsPath, f"{module}.{kind}") for kind in ("WindowsPath", "PureWindowsPath")]
    return named


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands in for ``defaultdict``, which torch's reader cannot fill; the factory is of no use here."""
    return {}


def globals_of(path: Path) -> list[str]:
    """Everything but tensors and harmless values that unpickling ``path`` would import, sorted.

    Works for zip archives of ``torch.save``, for its older format and for plain pickles; nothing is run. Damaged streams are
    read up to the damage, and :data:`UNREAD` is among the names then.
    """
    found: set[str] = set()
    for stream in _pickle_streams(path):
        with stream:
            _collect(stream, found)
    names = sorted(name for name in found if not _is_harmless(name))
    return [] if names == [UNREAD] else names  # damaged, and nothing of it is run


def check_sizes(path: Path) -> None:
    """Refuses pickles that would allocate more than their file explains, before anything is made.

    Raises:
        TooLarge: with the reason.
        Unclear: damaged, or what no checkpoint needs; with the reason.
    """
    if not is_archive(path):
        with path.open("rb") as stream:
            check_pickle(stream, path.stat().st_size)
        return
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            entries = archive.infolist()
            # The very bytes that torch reads: its names have no case, and it may see another entry than Python does.
            reader = torch._C.PyTorchFileReader(raw)  # type: ignore[attr-defined]
            if {name.lower() for name in reader.get_all_records()} != {_record(entry.filename) for entry in entries}:
                raise Unclear("a zip archive with two tables of contents")
            body = reader.get_record("data.pkl")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise Unclear(str(error)) from None
    check_pickle(io.BytesIO(body), max(path.stat().st_size, sum(entry.file_size for entry in entries)))


def _record(name: str) -> str:
    return name.lower().partition("/")[2]


def is_archive(path: Path) -> bool:
    """Whether torch reads ``path`` as a zip archive: by its first bytes, whatever follows."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _pickle_streams(path: Path) -> list[IO[bytes]]:
    if is_archive(path):
        try:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.lower().endswith(".pkl")]
                return [io.BytesIO(archive.read(name)) for name in names]
        except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
            return []
    return [path.open("rb")]


def _collect(stream: IO[bytes], found: set[str]) -> None:
    """All pickles of a stream; where one breaks off and others' names were found, :data:`UNREAD` says that there may be more."""
    for _ in range(LEGACY_PICKLES):
        start = stream.tell()
        try:
            _collect_one(stream, found)
        except Exception:
            # Whatever follows the damage is no pickle to us, but torch's reader may go on where ours stops.
            stream.seek(start)
            if found and stream.read(1):
                found.add(UNREAD)
            return


def _collect_one(stream: IO[bytes], found: set[str]) -> None:
    """One pickle, up to its STOP. Strings and the memo are followed because STACK_GLOBAL takes its names from there.

    Codes of the extension registry count in a whole pickle only: any byte may be their opcode, and no name speaks for them.
    """
    pushed: list[str | None] = []
    codes: set[str] = set()
    memo: dict[int, str | None] = {}
    texts = 0  # so many of the opcodes just before pushed a text
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            found.add(str(argument).replace(" ", ".", 1))
            pushed.append(None)
        elif name == "STACK_GLOBAL":
            # Both texts must have been pushed just before: what is popped in between would leave others on the stack.
            module, attribute = [None, None, *pushed][-2:] if texts >= 2 else (None, None)
            known = module is not None and attribute is not None
            found.add(f"{module}.{attribute}" if known else "(a name computed while unpickling)")
            pushed.append(None)
        elif name in ("EXT1", "EXT2", "EXT4"):
            codes.add(f"(extension code {argument})")
            pushed.append(None)
        elif name in _STRING_OPS:
            pushed.append(argument if isinstance(argument, str) else None)
        elif name in _GET_OPS:
            pushed.append(memo.get(int(argument)))  # type: ignore[arg-type]
        elif name in _PUT_OPS:
            memo[int(argument)] = pushed[-1] if pushed else None  # type: ignore[arg-type]
        elif name == "MEMOIZE":
            memo[len(memo)] = pushed[-1] if pushed else None
        elif opcode.stack_after:
            pushed.append(None)
        if name in _STRING_OPS or name in _GET_OPS:
            texts += 1
        elif name not in _PUT_OPS and name not in ("MEMOIZE", "FRAME"):
            texts = 0
    found |= codes


def _is_harmless(name: str) -> bool:
    if name in _TENSOR_PARTS or name in _harmless_names():
        return True
    module, _, attribute = name.rpartition(".")
    if module == "torch._utils":
        return attribute.startswith("_rebuild_")
    if module in ("torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse"):
        return attribute.endswith(("Storage", "Tensor")) or isinstance(vars(torch).get(attribute), torch.dtype)
    return False


def _harmless_names() -> set[str]:
    names = set()
    for item in harmless_globals():
        name = item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
        names |= {name, name.replace("builtins.", "__builtin__.", 1)}
    return names
