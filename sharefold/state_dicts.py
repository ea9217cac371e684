"""The tensors of a model as a plain dictionary, back into a model, and changes of it that are undone unless they are kept.

A state dict may hold more than tensors: what ``get_extra_state`` of a user's module returns, and the packed weights and types of
torch's quantised layers.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.tensor_values import has_values, is_expanded, write

_EXTRA = "_extra_state"  # torch's name for what get_extra_state returns


def tensor_state(model: nn.Module) -> dict[str, Tensor]:
    """The entries of the state dict that are tensors, themselves."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def check_fits_file(model: nn.Module, where: str) -> None:
    """Checks that all weights of ``model`` are tensors with values, as files hold nothing that would have to be unpickled.

    Raises:
        SharefoldError: names the first that is not; ``where`` says who asks. What ``get_extra_state`` returns is no weight.
    """
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) and name.rpartition(".")[2] != _EXTRA:
            kind = type(value).__name__
            raise SharefoldError(f"{where}: {name} is a {kind}, and a file holds tensors alone: dequantise its layer")
        if isinstance(value, Tensor) and not has_values(value):
            raise SharefoldError(f"{where}: {name} is on the meta device and has no values: load them with assign=True")


def file_tensors(model: nn.Module, where: str) -> dict[str, Tensor]:
    """:func:`tensor_state` for a file.

    Raises:
        SharefoldError: as :func:`check_fits_file`.

    Warns:
        SharefoldWarning: some extra state is no tensor and left out.
    """
    check_fits_file(model, where)
    tensors = tensor_state(model)
    left_out = [name for name in model.state_dict() if name not in tensors]
    if left_out:
        warnings.warn(
            f"{where}: {left_out[0]} is no tensor and not in the file: the network that the file is loaded into keeps its own",
            SharefoldWarning, stacklevel=4,
        )  # fmt: skip
    return tensors


def load_tensors(model: nn.Module, tensors: Mapping[str, Any], *, strict: bool = True, assign: bool = False) -> None:
    """``model.load_state_dict`` for tensors of this version of ``model``, from a file or a comprehension.

    A state dict carries the version of every module beside its tensors, a plain dictionary does not, and some modules
    (torchvision's MNASNet) refuse what has no version or convert it as an old one. What is no tensor stays as it is in ``model``
    unless it is given. Expanded tensors, which torch does not write to, get what ``tensors`` says as well.

    Raises:
        RuntimeError: as ``load_state_dict``.
    """
    own = model.state_dict(keep_vars=True)
    others = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    state: Any = OrderedDict({**others, **tensors})
    for name, value in own.items() if not assign else ():
        if name in tensors and isinstance(value, Tensor) and is_expanded(value) and value.shape == tensors[name].shape:
            with torch.no_grad():
                write(value, tensors[name])
            state[name] = value  # a tensor itself is not copied into itself
    state._metadata = getattr(own, "_metadata", {})
    model.load_state_dict(state, strict=strict, assign=assign)


def saved_state(model: nn.Module) -> dict[str, Any]:
    """Copies of all that the state dict holds, for :func:`load_tensors` to bring back."""
    state = model.state_dict().items()
    return {name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state}


class Trial:
    """What a module is left with at the end of :func:`trial`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._start = saved_state(module)
        self._left: dict[str, Any] | None = self._start  # None: what it holds then

    @property
    def kept(self) -> bool:
        """Whether it is another state than the one that it came with."""
        return self._left is not self._start

    def keep(self, *, going_on: bool = False) -> None:
        """What the module holds now; ``going_on``: it is written to again, so that a copy is needed."""
        self._left = saved_state(self._module) if going_on else None

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
