"""Tensors from a plain dictionary into a model, and changes of a model that are undone unless they are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True, assign: bool = False) -> None:
    """``model.load_state_dict`` for tensors of this version of ``model``, from a file or a comprehension.

    A state dict carries the version of every module beside its tensors, a plain dictionary does not, and some modules
    (torchvision's MNASNet) refuse what has no version or convert it as an old one.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    state: Any = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", {})
    model.load_state_dict(state, strict=strict, assign=assign)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers that a file would hold, for :func:`load_tensors` to bring back."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Trial:
    """What a module is left with at the end of :func:`trial`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._start = saved_tensors(module)
        self._left: dict[str, Tensor] | None = self._start  # None: what it holds then

    @property
    def kept(self) -> bool:
        """Whether it is another state than the one that it came with."""
        return self._left is not self._start

    def keep(self, *, going_on: bool = False) -> None:
        """What the module holds now; ``going_on``: it is written to again, so that a copy is needed."""
        self._left = saved_tensors(self._module) if going_on else None

    def drop(self) -> None:
        """What it came with, after all."""
        self._left = self._start


@contextmanager
def trial(module: nn.Module) -> Iterator[Trial]:
    """For a change of ``module``'s tensors; at the end, by an exception too, it has the state kept last, or the one before."""
    tried = Trial(module)
    try:
        yield tried
    finally:
        if tried._left is not None:
            load_tensors(module, tried._left)
