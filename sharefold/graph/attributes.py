"""What stands on the modules of a network beside its parameters and buffers: kept, and put back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from sharefold.layers.surgery import DEPTH, LONGEST, PLAIN, TORCHS
from sharefold.tensor_values import TensorValues

# Bytes: what is larger than this is data that a network reads, and a copy at every run would cost too much.
LARGEST = 1 << 28
_CONTAINERS = (dict, list, set, deque)


class Attributes:
    """What stands on the modules of ``models`` now, beside the values of their parameters and buffers.

    That is attributes, members of containers (dictionaries, lists, sets, deques, and these in one another as deep as ``DEPTH``)
    and values of plain tensors and arrays.
    """

    def __init__(self, *models: nn.Module) -> None:
        modules = [module for model in models for module in model.modules()]
        self._modules = [(module, dict(module.__dict__)) for module in modules]
        self._members: list[tuple[Any, Sequence[Any]]] = []
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []
        self._seen: dict[int, Any] = {}
        tensors: list[Tensor] = []
        for _, attributes in self._modules:
            for key, value in attributes.items():
                if type(value) in PLAIN:
                    continue
                if key in TORCHS:  # parameters, buffers, modules and hooks are themselves none of these
                    if isinstance(value, _CONTAINERS):
                        self._members.append((value, _members(value)))
                else:
                    self._see(value, DEPTH, tensors)
        if tensors:
            registered = {id(t) for module in modules for held in (module._parameters, module._buffers) for t in held.values()}
            tensors = [tensor for tensor in tensors if id(tensor) not in registered]
        self._tensors = TensorValues(tensors)

    def _see(self, value: Any, depth: int, tensors: list[Tensor]) -> None:
        if id(value) in self._seen:
            return
        if isinstance(value, Tensor | np.ndarray):
            self._seen[id(value)] = value
            if value.nbytes > LARGEST:
                return
            if isinstance(value, Tensor):
                tensors.append(value)
            elif value.flags.writeable:
                self._arrays.append((value, value.copy()))
        elif isinstance(value, (*_CONTAINERS, tuple)):
            self._seen[id(value)] = value
            members = _members(value)
            if not isinstance(value, tuple):
                self._members.append((value, members))
            if depth and len(members) <= LONGEST:
                for part in dict.values(value) if isinstance(value, dict) else members:
                    if type(part) not in PLAIN:
                        self._see(part, depth - 1, tensors)

    def put_back(self) -> bool:
        """Whether something was other than it is again now."""
        changed = [_restore(module, attributes) for module, attributes in self._modules]
        changed += [_refill(container, members) for container, members in self._members]
        changed += [_rewrite(array, values) for array, values in self._arrays]
        return any([*changed, self._tensors.put_back()])


def _restore(module: nn.Module, attributes: dict[str, Any]) -> bool:
    """Whether there was something to restore."""
    held = module.__dict__
    added = held.keys() - attributes.keys()
    for key in added:
        del held[key]
    changed = bool(added)
    for key, value in attributes.items():
        if key not in held or held[key] is not value:
            held[key] = value
            changed = True
    return changed


def _members(container: Any) -> Sequence[Any]:
    """Of a dictionary the pairs. Classes of users may have methods of their own, and those of the base tell what there is."""
    if not container:
        return ()
    if isinstance(container, OrderedDict):
        return [*OrderedDict.items(container)]
    if isinstance(container, dict):
        return [*dict.items(container)]
    base: Any = next(kind for kind in (list, set, deque, tuple) if isinstance(container, kind))
    return [*base.__iter__(container)]


def _refill(container: Any, members: Sequence[Any]) -> bool:
    """Whether it had other members, or the same in another order."""
    if not container and not members:  # as nearly all of them
        return False
    if _same(_members(container), members, isinstance(container, dict)):
        return False
    if isinstance(container, OrderedDict):
        OrderedDict.clear(container)
        for key, value in members:
            OrderedDict.__setitem__(container, key, value)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, members)
    elif isinstance(container, list):
        list.__setitem__(container, slice(None), members)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, members)
    else:
        deque.clear(container)
        deque.extend(container, members)
    return True


def _same(now: Sequence[Any], members: Sequence[Any], pairs: bool) -> bool:
    """By identity: members may be tensors, whose equality is not a bool."""
    if len(now) != len(members):
        return False
    if pairs:
        return all(a is c and b is d for (a, b), (c, d) in zip(now, members, strict=True))
    return all(a is b for a, b in zip(now, members, strict=True))


def _rewrite(array: np.ndarray, values: np.ndarray) -> bool:
    """Whether it held something else."""
    if array.shape != values.shape or array.tobytes() == values.tobytes():
        return array.shape != values.shape
    array[...] = values
    return True
