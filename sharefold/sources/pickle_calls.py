"""The calls that a checkpoint's pickle may make, replayed with stand-ins: what each may be given, and what it costs.

A list of what is allowed, as pickles of tensors, numpy arrays and plain values have it: sizes, shapes, strides, types and
encodings are written out in the stream and not calculated by a call, so they can be compared with the size of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

import torch

# Elements of a tensor beyond those of its storage (torch keeps strides of 0, as `expand` makes them).
_EXPANDED = 1 << 20
_KEY_PARTS = 64
_DIMENSIONS = 64
_TEXT = 100
# Python's dict takes quadratic time over keys of one hash, and multiples of 2^61 - 1 all have the same.
_INT_KEY = 1 << 60
_SLACK = 1 << 20
_ENCODINGS = ("latin1", "latin-1", "utf-8", "utf8", "ascii")
_DTYPE = re.compile(r"[<>=|]?(?:[?bBhHiIlLqQefdgFDG]|b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32))|bool|u?int(?:8|16|32|64)"
                    r"|float(?:16|32|64)|complex(?:64|128)")  # fmt: skip
_STORAGES = {"Double": 8, "Float": 4, "Half": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "BFloat16": 2,
             "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1, "QUInt2x4": 1,
             "Untyped": 1}  # fmt: skip


class TooLarge(Exception):
    """The pickle would take more memory or time than its size warrants; the text says why."""


class Unclear(Exception):
    """Damaged, or something that no checkpoint needs: not to be loaded without trust; the text says what."""


class Name:
    """A class or function."""

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What a call made. It is never a size, a key or a type: those are written out."""


class Atom(Made):
    """A number, path or date: may be a key."""


class Text(Made):
    """Bytes that were written as a text."""

    def __init__(self, text: str) -> None:
        self.text = text


class Attributes(Made):
    """Something that takes attributes from a dict."""


class Dtype(Made):
    """A plain dtype of numpy."""


class Array(Made):
    """An array of numpy that is filled by its state."""


class Mapping(Made):
    """A dict; only the number of its keys is kept."""

    count = 0


class TensorMade(Made):
    """A tensor."""


class Storage(Made):
    def __init__(self, count: int, item: int) -> None:
        self.count, self.item = count, item


class Calls:
    """The calls of one pickle in a file that holds ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._budget = size + _SLACK
        self._expanded = 0
        self._storages: dict[str, int] = {}
        self._stored = 0

    def call(self, function: Any, arguments: Any) -> Any:
        """The stand-in for ``function(*arguments)``.

        Raises:
            TooLarge: the call may take more than the file explains.
            Unclear: it is none of the calls that are known.
        """
        if not isinstance(function, Name):
            raise Unclear("a call of what is no function")
        name = function.name
        if not isinstance(arguments, tuple):
            raise TooLarge(f"{name[:_TEXT]} called with what is no tuple")
        rule = _RULES.get(name) or (_RULES["a storage"] if _is_storage_or_tensor(name) else None)
        if rule is None:
            raise Unclear(f"it calls {name[:_TEXT]}")
        for argument in arguments:
            self._charge(argument)
        return rule(self, name, arguments)

    def storage(self, pid: Any) -> Storage:
        """The stand-in for a storage, whose elements all have to be in the file."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] not in ("storage", b"storage"):
            raise Unclear("a persistent id that is no storage")
        kind, key, location, count = pid[1:5]
        item = _STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage")) if isinstance(kind, Name) else None
        if item is None or type(key) is not str or type(location) not in (str, bytes):
            raise Unclear("a storage of an unknown kind")
        if type(count) is not int or not 0 <= count * item <= self.size:
            raise Unclear(f"a storage of {number(count)} elements in a file of {self.size:,} bytes")
        self._stored += max(0, count * item - self._storages.get(key, 0))
        self._storages[key] = max(count * item, self._storages.get(key, 0))
        if self._stored > self.size:
            raise Unclear(f"storages of more than the {self.size:,} bytes of the file")
        if len(pid) == 6 and pid[5] is not None:
            view = pid[5]
            if type(view) is not tuple or len(view) != 3 or not all(type(part) is int for part in view[1:]):
                raise Unclear("a view of a storage")
            if min(view[1:]) < 0 or sum(view[1:]) > count:
                raise TooLarge("a view that is larger than its storage")
            count = view[2]
        return Storage(count, item)

    def build(self, made: Any, state: Any) -> None:
        """Checks the state that ``made`` is given."""
        if isinstance(made, Attributes) and isinstance(state, Mapping):
            self._charge(state)
        elif isinstance(made, Array) and _is_array_state(state):
            self._charge(state[4])
        elif not isinstance(made, Dtype) or not _is_plain_state(state):
            raise Unclear("a state for what has none")

    def _charge(self, value: Any) -> None:
        """Counts what a call copies: the stream may name one value again and again."""
        self._budget -= _length(value)
        if self._budget < 0:
            raise TooLarge("calls that copy the same values again and again")

    def check_extent(self, storage: Any, offset: Any, shape: Any, stride: Any, item: int) -> None:
        """Refuses a tensor that is larger than its storage; strides of 0 may repeat it a little."""
        if not isinstance(storage, Storage):
            raise TooLarge("a tensor without a storage")
        if not all(_are_sizes(sizes) for sizes in (shape, stride, [offset])) or len(shape) != len(stride):
            raise TooLarge("a tensor whose shape is not written out")
        held = storage.count * storage.item // item
        count = math.prod(shape)
        if count > max(held, _EXPANDED):
            raise TooLarge(f"a tensor of {number(count)} elements in a storage of {held:,}")
        self._expanded += max(0, count - held)
        if self._expanded > 4 * _EXPANDED:
            raise TooLarge("tensors that repeat their storages too often")
        last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
        if count and last >= held:
            raise TooLarge(f"a tensor that reaches to element {number(last)} in a storage of {held:,}")


def check_key(key: Any) -> None:
    """Keys are hashed, and the hash of containers that share their parts takes exponential time.

    Raises:
        TooLarge: no scalar, and no short tuple of scalars.
    """
    if type(key) is tuple:
        if len(key) > _KEY_PARTS or not all(_is_scalar(part) for part in key):
            raise TooLarge("a nested container as a key")
    elif not _is_scalar(key):
        raise TooLarge("a container as a key")


def number(value: Any) -> str:
    """A count for a message."""
    return f"{value:,}" if type(value) is int and abs(value) < 1 << 63 else "too many"


def _is_scalar(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < _INT_KEY
    return value is None or type(value) in (str, bytes, float, bool) or isinstance(value, (Name, Atom, Text, Dtype))


def _length(value: Any) -> int:
    if isinstance(value, Text):
        return len(value.text)
    if isinstance(value, Mapping):
        return value.count
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _are_sizes(value: Any) -> bool:
    plain = type(value) in (tuple, list) and len(value) <= _DIMENSIONS
    return plain and all(type(side) is int and 0 <= side < 1 << 63 for side in value)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (int, float, bool) or (type(value) in (str, bytes) and len(value) <= _TEXT)


def _is_storage_or_tensor(name: str) -> bool:
    return name.startswith("torch") and name.endswith(("Storage", "Tensor"))


def _text(value: Any) -> Any:
    """The text in what may be a text, or bytes as protocol 2 writes them."""
    return value.text if isinstance(value, Text) else value.decode("latin1") if type(value) is bytes else value


def _is_dtype(value: Any) -> bool:
    text = _text(value)
    return type(text) is str and len(text) < _TEXT and _DTYPE.fullmatch(text) is not None


def _is_plain_state(state: Any) -> bool:
    """Whether the state of a dtype is that of a plain one: version, byte order, no parts, numbers."""
    if type(state) is not tuple or not 5 <= len(state) <= 9 or not all(_is_plain(_text(part)) for part in state):
        return False
    return state[2:5] == (None, None, None) and all(type(part) is int and abs(part) < 64 for part in state[5:8])


def _is_array_state(state: Any) -> bool:
    """Whether the state of an array holds bytes; numpy compares their number with the shape."""
    if type(state) is not tuple or len(state) != 5:
        return False
    _, shape, dtype, _, data = state
    return _are_sizes(shape) and isinstance(dtype, Dtype) and (isinstance(data, (Text, str, bytes)))


# One rule a function: it gets the calls, the function's name and the arguments, and returns the stand-in. ----------------

_Rule = Callable[[Calls, str, tuple[Any, ...]], Any]


def _by_size(calls: Calls, name: str, arguments: tuple[Any, ...]) -> NoReturn:
    raise TooLarge(f"a {name} by its size")


def _plain(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if not all(_is_plain(_text(argument)) for argument in arguments):
        raise TooLarge(f"a {name} of what is not written out")
    return Atom()


def _sequence(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) > 1 or not all(type(argument) in (list, tuple) for argument in arguments):
        raise TooLarge(f"a {name} of what is not written out")
    if name.endswith("set"):
        for member in arguments[0] if arguments else ():
            check_key(member)
    return Made()


def _mapping(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    for argument in arguments[:1]:
        if isinstance(argument, Mapping):
            continue  # its keys have been looked at
        if type(argument) not in (list, tuple):
            raise TooLarge(f"a {name} of what is not written out")
        for member in argument:
            pair = name.endswith("Counter") or type(member) not in (list, tuple) or not member
            check_key(member if pair else member[0])
    return Attributes()


def _anything(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    return Made()  # of `defaultdict`, whose stand-in looks at nothing


def _empty(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if arguments:
        raise Unclear(f"{name} with arguments")
    return Attributes()


def _encode(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 2 or type(arguments[0]) is not str or not _is_encoding(arguments[1]):
        raise TooLarge(f"a text in an encoding other than {', '.join(_ENCODINGS)}")
    return Text(arguments[0])


def _bytearray(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    whole = len(arguments) == 1 and isinstance(arguments[0], (Text, bytes))
    encoded = len(arguments) == 2 and type(arguments[0]) is str and _is_encoding(arguments[1])
    if arguments and not whole and not encoded:
        raise TooLarge("a bytearray by its size, or of what is not written out")
    return Made()


def _is_encoding(value: Any) -> bool:
    return type(value) is str and value.lower() in _ENCODINGS


def _size(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 1 or not _are_sizes(arguments[0]):
        raise TooLarge("a shape that is not written out")
    return tuple(arguments[0])


def _dtype(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if arguments and re.fullmatch(r"[|<>=]?[OSUMm]\d*", _text(arguments[0]) if isinstance(_text(arguments[0]), str) else ""):
        raise Unclear("a numpy array of objects, texts or dates")
    if not arguments or not _is_dtype(arguments[0]) or not all(type(flag) in (bool, int) for flag in arguments[1:]):
        raise TooLarge("a dtype of numpy other than the plain ones")
    return Dtype()


def _scalar(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 2 or not isinstance(arguments[0], Dtype) or not isinstance(arguments[1], (Text, str, bytes)):
        raise TooLarge("a numpy scalar without its bytes")
    return Atom()


def _reconstruct(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    kind, shape, dtype = arguments if len(arguments) == 3 else (None, None, None)
    array = isinstance(kind, Name) and kind.name == "numpy.ndarray"
    if not array or not _are_sizes(shape) or math.prod(shape) > 1 or not _is_dtype(dtype):  # type: ignore[arg-type]
        raise TooLarge("a numpy array by its size")
    return Array()


def _parameter(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if not arguments or not isinstance(arguments[0], TensorMade):
        raise TooLarge("a parameter without a tensor")
    _check_state(arguments[3:])
    return TensorMade()


def _check_state(states: tuple[Any, ...]) -> None:
    if not all(state is None or isinstance(state, Mapping) for state in states):
        raise Unclear("a tensor with attributes that are no dict")


def _tensor(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) < 4:
        raise Unclear(f"{name} without its arguments")
    storage = arguments[0]
    item = storage.item if isinstance(storage, Storage) else 1
    if name.endswith("_v3"):
        kind = arguments[6].name if len(arguments) > 6 and isinstance(arguments[6], Name) else ""
        found = vars(torch).get(kind.removeprefix("torch."))
        if not isinstance(found, torch.dtype):
            raise Unclear("a tensor of an unknown dtype")
        item = found.itemsize
    calls.check_extent(storage, arguments[1], arguments[2], arguments[3], item)
    if name.endswith("qtensor") and math.prod(arguments[2]) > storage.count:  # torch fills it before it sets its storage
        raise TooLarge("a quantized tensor that is larger than its storage")
    return TensorMade()


def _sparse(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    layout, parts = arguments if len(arguments) == 2 else (None, None)
    if not isinstance(layout, Atom) or type(parts) is not tuple or len(parts) > 5:
        raise Unclear(f"{name} without its arguments")
    if not all(isinstance(part, TensorMade) or type(part) is bool or _are_sizes(part) for part in parts):
        raise TooLarge("a sparse tensor whose shape is not written out")
    return Made()


def _meta(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 4 or not isinstance(arguments[0], Name) or not all(_are_sizes(sizes) for sizes in arguments[1:3]):
        raise TooLarge("a tensor whose shape is not written out")
    return Made()


def _subclass(calls: Calls, name: str, arguments: tuple[Any, ...]) -> Any:
    if len(arguments) != 4:
        raise Unclear(f"{name} without its arguments")
    _check_state(arguments[3:])
    made = calls.call(arguments[0], arguments[2])
    if not isinstance(made, TensorMade):
        raise Unclear(f"{name} of what is no tensor")
    return made


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_SCALARS = ("bool", "bool_", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32",
            "float64", "longdouble", "float128", "complex64", "complex128", "longlong", "ulonglong", "intc", "uintc")  # fmt: skip
_ATOMS = (
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "complex")),
    *(f"datetime.{name}" for name in ("datetime", "date", "timedelta")),
    *(f"pathlib{local}.{name}" for local in ("", "._local")
      for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(f"numpy.{name}" for name in _SCALARS), "torch.device", "torch.serialization._get_layout",
)  # fmt: skip
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ATOMS, _plain),
    **dict.fromkeys(("builtins.list", "builtins.tuple", "builtins.set", "builtins.frozenset"), _sequence),
    **dict.fromkeys(("builtins.dict", "collections.OrderedDict", "collections.Counter"), _mapping),
    "collections.defaultdict": _anything,
    **dict.fromkeys(("argparse.Namespace", "types.SimpleNamespace"), _empty),
    "_codecs.encode": _encode,
    "builtins.bytearray": _bytearray,
    "torch.Size": _size,
    "numpy.dtype": _dtype,
    "numpy.ndarray": _by_size,
    **{f"{module}.scalar": _scalar for module in _NUMPY},
    **{f"{module}._reconstruct": _reconstruct for module in _NUMPY},
    "torch.nn.parameter.Parameter": _parameter,
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), _parameter),
    **{f"torch._utils._rebuild_{kind}": _tensor for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor")},
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "a storage": _by_size,
}  # fmt: skip
