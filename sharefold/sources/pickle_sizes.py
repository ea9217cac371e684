"""What a pickle would allocate, found by replaying it with stand-ins that hold nothing.

``torch.load(weights_only=True)`` runs no code, but it believes sizes: a few hundred bytes may ask for an array of 8 GB, or
for a key whose hash takes years. The replay follows the stream with Python's own unpickler in which every class and function is
a name; what a call would allocate is checked against the size of the file before anything real is made
(:mod:`.pickle_calls`). What the replay cannot follow is not loaded.
"""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import IO, Any, ClassVar, NoReturn

from sharefold.sources.pickle_calls import Calls, Made, Mapping, Name, TooLarge, Unclear, check_key

__all__ = ["LEGACY_PICKLES", "TooLarge", "Unclear", "check_pickle"]

LEGACY_PICKLES = 5  # magic number, protocol, system information, the object, storage keys
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch's older format; torch stops where it is another


class _Bounded:
    """A stream that never makes room for more than it has."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size
        self.readline = stream.readline

    def read(self, count: int) -> bytes:
        return self._stream.read(max(0, min(count, self._size)))

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer)  # type: ignore[attr-defined]


def check_pickle(stream: IO[bytes], size: int) -> None:
    """Checks one pickle, or the five of torch's older format, in a file that holds ``size`` bytes.

    Raises:
        TooLarge: it would allocate more than the file explains, or calculates its sizes.
        Unclear: damaged, or it makes calls that no checkpoint needs.
    """
    bounded, calls = _Bounded(stream, size), Calls(size)
    try:
        found = _Replay(bounded, calls).load()
        if type(found) is int and found == _LEGACY_MAGIC:
            for _ in range(LEGACY_PICKLES - 1):
                _Replay(bounded, calls).load()
    except (TooLarge, Unclear):
        raise
    except Exception as error:
        # What this unpickler cannot follow, torch's may: nothing unseen gets there.
        raise Unclear(f"{type(error).__name__}: {error}") from None


class _Replay(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's unpickler in Python, whose memo is a dict: the one in C makes room for any index that a stream names."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    append: Any
    read: Any
    stack: list[Any]
    pop_mark: Any

    def __init__(self, stream: _Bounded, calls: Calls) -> None:
        super().__init__(stream, encoding="latin1")
        self.calls = calls

    def find_class(self, module: str, name: str) -> Any:
        # Names of Python 2, as torch translates them.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Name(f"{module}.{name}")

    def get_extension(self, code: int) -> NoReturn:
        raise Unclear("an extension code")

    def persistent_load(self, pid: Any) -> Any:
        return self.calls.storage(pid)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.calls.call(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        self.load_reduce()

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        state = self.stack.pop()
        self.calls.build(self.stack[-1], state)

    dispatch[pickle.BUILD[0]] = load_build

    def refuse(self) -> NoReturn:
        raise Unclear("an object of a class")

    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        dispatch[_code[0]] = refuse

    def load_bytearray8(self) -> None:
        # Python's own makes room for as many bytes as the stream names before it reads them.
        count = int.from_bytes(self.read(8), "little")
        found = bytearray(self.read(count))
        if len(found) != count:
            raise Unclear(f"{count} bytes of which the file holds {len(found)}")
        self.append(found)

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    # Containers that hash stay empty here: only their keys are looked at.

    def load_empty_dictionary(self) -> None:
        self.append(Mapping())

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary

    def load_empty_set(self) -> None:
        self.append(Made())

    dispatch[pickle.EMPTY_SET[0]] = load_empty_set

    def load_setitem(self) -> None:
        self.stack.pop()
        key = self.stack.pop()
        self.set_keys(self.stack[-1], [key])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        keys = self.pop_mark()[::2]
        self.set_keys(self.stack[-1], keys)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        keys = self.pop_mark()[::2]
        self.append(Mapping())
        self.set_keys(self.stack[-1], keys)

    dispatch[pickle.DICT[0]] = load_dict

    def set_keys(self, container: Any, keys: list[Any]) -> None:
        for key in keys:
            check_key(key)
        if isinstance(container, Mapping):
            container.count += len(keys)

    def load_additems(self) -> None:
        for key in self.pop_mark():
            check_key(key)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        for key in self.pop_mark():
            check_key(key)
        self.append(Made())

    dispatch[pickle.FROZENSET[0]] = load_frozenset
