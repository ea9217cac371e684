"""Tensors from a plain dictionary into a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
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
