"""What a pickle would allocate, found by replaying it with stand-ins that hold nothing.

``torch.load(weights_only=True)`` runs no code, but it believes sizes: a few hundred bytes may ask for an array of 8 GB, or
for a key whose hash takes years. The replay follows the stream with Python's own unpickler in which every class and function is
a name; what a call would allocate is checked against the size of the file before anything real is made.
"""

from __future__ import annotations

import math
import pickle
from typing import IO, Any, ClassVar, NoReturn

# Elements of a tensor beyond those of its storage (torch keeps strides of 0, as `expand` makes them).
_EXPANDED = 1 << 20
_KEY_PARTS = 64
LEGACY_PICKLES = 5  # magic number, protocol, system information, the object, storage keys
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii", "bytes")


class TooLarge(Exception):
    """The pickle would take more memory or time than its size warrants; the text says why."""


class _Unclear(Exception):
    """Not for this replay to judge: torch's own reader refuses it."""


class _Name:
    """A class or function."""

    def __init__(self, name: str) -> None:
        self.name = name.replace("__builtin__.", "builtins.", 1)


class _Made:
    """What a call made."""


class _Storage(_Made):
    def __init__(self, count: int) -> None:
        self.count = count


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
    """Checks one stream of at most five pickles (the older format of torch has as many) in a file of ``size`` bytes.

    Raises:
        TooLarge: it would allocate more than the file explains.
    """
    bounded = _Bounded(stream, size)
    try:
        for _ in range(LEGACY_PICKLES):
            _Replay(bounded, size).load()
    except TooLarge:
        raise
    except Exception:
        # Damaged, or raw tensor bytes behind the last pickle of the older format; torch's reader says what is wrong.
        return


class _Replay(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Python's unpickler in Python, whose memo is a dict: the one in C makes room for any index that a stream names."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    append: Any
    stack: list[Any]
    pop_mark: Any

    def __init__(self, stream: _Bounded, size: int) -> None:
        super().__init__(stream, encoding="latin1")
        self.size = size

    def find_class(self, module: str, name: str) -> Any:
        return _Name(f"{module}.{name}")

    def get_extension(self, code: int) -> NoReturn:
        raise _Unclear

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            return _Made()
        count = pid[4]
        if not isinstance(count, int) or not 0 <= count <= 8 * self.size:
            raise TooLarge(f"a storage of {_number(count)} elements in a file of {self.size:,} bytes")
        return _Storage(count)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        self.load_reduce()

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_build(self) -> None:
        self.stack.pop()  # a state; whatever it holds has been made already

    dispatch[pickle.BUILD[0]] = load_build

    def refuse(self) -> NoReturn:
        raise _Unclear

    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        dispatch[_code[0]] = refuse

    # Containers that hash stay empty here: only their keys are looked at.

    def load_setitem(self) -> None:
        self.stack.pop()
        _check_key(self.stack.pop())

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        for key in self.pop_mark()[::2]:
            _check_key(key)

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        for key in self.pop_mark()[::2]:
            _check_key(key)
        self.append({})

    dispatch[pickle.DICT[0]] = load_dict

    def load_additems(self) -> None:
        for key in self.pop_mark():
            _check_key(key)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        for key in self.pop_mark():
            _check_key(key)
        self.append(_Made())

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise _Unclear
        name = function.name
        leaf = name.rpartition(".")[2]
        first = arguments[0] if arguments else None
        if name == "builtins.bytearray" and not isinstance(first, (bytes, str, _Made, list)):
            raise TooLarge("a bytearray by its size")
        if name.startswith("torch") and leaf.endswith(("Storage", "Tensor")) and not isinstance(first, _Made):
            raise TooLarge(f"a {name} by its size")
        if name == "numpy.ndarray" or (leaf == "_reconstruct" and not _is_empty_shape(arguments)):
            raise TooLarge("a numpy array by its size")
        if leaf == "scalar" and name.startswith("numpy") and (len(arguments) < 2 or arguments[1] is None):
            raise TooLarge("a numpy scalar without its bytes")
        if name == "_codecs.encode" and (len(arguments) != 2 or str(arguments[1]).lower() not in _ENCODINGS):
            raise TooLarge(f"a text in the encoding {str(arguments[-1])[:40]!r}")
        if leaf in ("set", "frozenset", "dict", "OrderedDict", "Counter", "defaultdict"):
            _check_members(leaf, arguments)
        if name == "torch.Size" and isinstance(first, (tuple, list)):
            return tuple(first)
        if isinstance(first, _Storage) and len(arguments) > 2:
            self.check_extent(first, arguments[2])
        return _Made()

    def check_extent(self, storage: _Storage, shape: Any) -> None:
        if not isinstance(shape, (tuple, list)) or not all(isinstance(side, int) for side in shape):
            return
        count = math.prod(shape)
        if count > max(storage.count, _EXPANDED):
            raise TooLarge(f"a tensor of {_number(count)} elements in a storage of {storage.count:,}")


def _is_empty_shape(arguments: tuple[Any, ...]) -> bool:
    """Whether numpy is asked for an array that is filled later, as every pickled array is."""
    shape = arguments[1] if len(arguments) > 1 else None
    return isinstance(shape, tuple) and all(isinstance(side, int) for side in shape) and math.prod(shape) <= 1


def _check_members(kind: str, arguments: tuple[Any, ...]) -> None:
    for argument in arguments:
        if not isinstance(argument, (list, tuple)):
            continue
        for member in argument:
            pair = kind in ("dict", "OrderedDict") and isinstance(member, (list, tuple)) and member
            _check_key(member[0] if pair else member)


def _check_key(key: Any) -> None:
    """Keys are hashed, and the hash of tuples of tuples that share their parts takes exponential time."""
    if isinstance(key, tuple) and (len(key) > _KEY_PARTS or any(isinstance(part, (tuple, frozenset)) for part in key)):
        raise TooLarge("a nested container as a key")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and abs(value) < 1 << 63 else "too many"
