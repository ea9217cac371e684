"""Every tensor of whatever a network returns, by the way that leads to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

WHOLE = "output"  # the name of the only tensor of a network that returns one


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The distinct tensors in nested mappings, lists, (named) tuples and dataclasses, in order.

    Names are the keys, fields and positions on the way, joined by dots: ``"heads.0"``. A tensor that occurs twice is
    listed where it occurs first.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in walk(output):
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of everything that is no container."""
    children = _children(value)
    if children is None:
        yield path or WHOLE, value
        return
    for key, child in children:
        yield from walk(child, f"{path}.{key}" if path else key)


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):  # also the ModelOutput of Hugging Face
        return [(str(key), child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (list, tuple)):
        return [(str(index), child) for index, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return None
