"""Whether a network in memory computes what its registered architecture does.

What modules print and the shapes of their tensors leave out the classes of blocks, methods put on a module, and hooks.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.architectures.bounded import parameters_on_meta
from sharefold.architectures.build import build_base
from sharefold.calibration.images import input_config
from sharefold.errors import SharefoldError
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, elements
from sharefold.layers import form_of
from sharefold.outputs.leaves import tensors_of
from sharefold.running import run_on
from sharefold.state_dicts import load_tensors

# A run would be felt with more parameters, or more numbers in a sample.
MOST_PARAMETERS, MOST_ELEMENTS = 5 * 10**7, 3 * 384 * 384
_DROP = re.compile("drop", re.I)


def same_code(model: nn.Module, built: nn.Module) -> bool:
    """Whether both run the same code: modules of the same classes, the same methods on single modules, as many forward hooks.

    What a hook does is not looked at: one that ``built`` does not have is the user's, and a loaded network would not have it.
    Dropout of any kind is passed over, as it does nothing at evaluation.
    """
    ours, theirs = _modules(model), _modules(built)
    return ours.keys() == theirs.keys() and all(_same_class(m, theirs[n]) and _own(m) == _own(theirs[n]) for n, m in ours.items())


def same_answers(model: nn.Module, base: dict[str, Any], tensors: Mapping[str, Tensor], example: Input | None = None) -> bool:
    """Whether the architecture ``base`` with the weights of ``model`` answers as ``model`` does, to the bit.

    True as well where that cannot be seen: of networks and samples so large that the runs would be felt, of networks that draw
    random numbers, and of those that do not run on ``example``.

    Args:
        model: in any mode, on any device; left as it was, random states included.
        base: as :func:`build_base` takes it.
        tensors: the state dict of ``model``.
        example: what ``model`` takes; by default noise of the size of image that ``model`` carries.
    """
    parts = [*model.parameters(), *model.buffers()]
    if any(part.is_meta for part in parts) or sum(part.numel() for part in parts) > MOST_PARAMETERS:
        return True
    with preserved(model):
        for given in _noises(model) if example is None else [example]:
            if elements(given) > MOST_ELEMENTS:
                return True
            with suppress(Exception):  # networks raise what they like
                said = tensors_of(run_on(model, given))
                break
        else:
            return True
        try:
            built = _with_tensors(base, model, tensors)
            return _equal(said, tensors_of(run_on(built, given))) or not _equal(said, tensors_of(run_on(model, given)))
        except Exception:
            return False


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Those by name that count at evaluation."""
    found = model.named_modules(remove_duplicate=False)
    return {n: m for n, m in found if not _DROP.search(n.rpartition(".")[2]) and not _DROP.match(type(m).__name__)}


def _same_class(ours: nn.Module, theirs: nn.Module) -> bool:
    """A stock layer may be of another class that computes the same: expanding makes torch's Linear of timm's."""
    if type(ours) is type(theirs):
        return True
    form = form_of(ours)
    return form is not None and form == form_of(theirs)


def _own(module: nn.Module) -> tuple[set[str], int, int]:
    """Methods that are put on this module alone, other than how it is trained or moved, and its numbers of hooks."""
    kind = type(module)
    methods = {key for key in vars(module) if inspect.isroutine(found := getattr(kind, key, None))
               and (key == "forward" or found is not getattr(nn.Module, key, None))}  # fmt: skip
    return methods, len(module._forward_hooks), len(module._forward_pre_hooks)


def _noises(model: nn.Module) -> Iterator[Tensor]:
    """An image of as many channels as the first convolution takes, and one of as many as the model says: some rearrange them."""
    said, *size = input_config(model)["input_size"]
    first = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), said)
    for channels in dict.fromkeys((first, said)):
        yield torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))


def _with_tensors(base: dict[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The architecture ``base`` that reads the tensors of ``model`` themselves, its tables beside them in the same types."""
    try:
        with parameters_on_meta():
            built = build_base(base)
        usable = not any(buffer.is_meta for buffer in built.buffers())
    except SharefoldError:  # a builder that calculates with its weights
        usable = False
    if not usable:
        built = build_base(base)
    load_tensors(built, tensors, assign=True)
    ours = dict(model.named_buffers(remove_duplicate=False))
    for name, module in built.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            like = ours.get(f"{name}.{key}" if name else key)
            if buffer is not None and like is not None:
                module._buffers[key] = buffer.to(like)
    return built


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    if first.keys() != second.keys() or any(tensor.shape != second[name].shape for name, tensor in first.items()):
        return False
    return all(torch.allclose(tensor, second[name], rtol=0, atol=0, equal_nan=True) for name, tensor in first.items())
