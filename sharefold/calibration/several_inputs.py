"""What networks of several inputs are calibrated with: tensors of the user's, batches of a loader, or made-up ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sharefold.errors import SharefoldError
from sharefold.inputs import Input, Inputs, check_count, each_of, joined, parameters_of, taken
from sharefold.procedural import dead_leaves

# Samples of a data set that are read at a time.
TOGETHER = 64


def first_of(model: nn.Module, given: Any, count: int) -> Any:
    """A tuple or list of tensors as one batch, and the first ``count`` samples of what gives batches; else ``given`` itself.

    A batch is a tensor or a tuple of them. Of ``((a, b), target)`` the pair is taken, also where that is all that is given, of
    ``(a, b, target)`` from a loader as many as ``forward`` of ``model`` needs.

    Raises:
        SharefoldError: no batches, or some without tensors, or of several shapes.
    """
    if isinstance(given, tuple | list) and not (given and isinstance(given[0], tuple | list)):
        some = any(isinstance(one, Tensor) for one in given)
        return taken(given, "calibration") if some or not given else given
    if isinstance(given, tuple) and len(given) == 2 and (given[1] is None or isinstance(given[1], Tensor)):
        return taken(given[0], "calibration")
    if isinstance(given, Dataset):
        given = DataLoader(given, TOGETHER)
    elif not isinstance(given, Iterable) or isinstance(given, str | Mapping) or hasattr(given, "shape"):
        return given
    needed = parameters_of(model)[1]
    batches: list[Input] = []
    have = 0
    for item in given:
        if isinstance(item, tuple | list) and item:
            item = item[0] if isinstance(item[0], tuple | list) else item[: needed or None]
        batch = taken(item, "calibration")
        if not isinstance(batch, Tensor | Inputs):
            raise SharefoldError(f"calibration: a batch is a {type(batch).__name__}: want a tensor, or a tuple of tensors")
        batches.append(batch[: count - have])
        have += len(batches[-1])
        if have >= count:
            break
    if not batches:
        raise SharefoldError("calibration: there are no batches: pass a loader that has some")
    if len({len(each_of(batch)) for batch in batches}) > 1:
        raise SharefoldError("calibration: batches have different numbers of tensors: give every batch all inputs")
    try:
        return joined(batches)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SharefoldError(f"calibration: batches do not fit together ({reason}): give all of them one shape") from None


def checked_inputs(model: nn.Module, given: Inputs, dtype: torch.dtype) -> Inputs:
    """``given`` after a check, floats as ``dtype``; whole numbers and masks stay what they are.

    Raises:
        SharefoldError: other tensors than ``forward`` takes, no sample, no floats among them, or NaN in one.
    """
    check_count(model, given, "calibration")
    if len(given) == 0:
        raise SharefoldError("calibration: there are no samples: pass at least one of every input")
    floats = [tensor.is_floating_point() for tensor in given.tensors]
    if not any(floats):
        raise SharefoldError("calibration: no input holds floats: pass normalised images or signals among them")
    for place, tensor in enumerate(given.tensors, 1):
        if tensor.is_meta or tensor.layout != torch.strided:
            raise SharefoldError(f"calibration: input {place} is no ordinary tensor in memory: pass dense tensors with values")
    for place, (tensor, floating) in enumerate(zip(given.tensors, floats, strict=True), 1):
        if floating and not bool(torch.isfinite(tensor).all()):
            raise SharefoldError(f"calibration: input {place} holds NaN or infinity: check how it was normalised")
    return given.each(lambda tensor: ordinary(tensor.to(dtype) if tensor.is_floating_point() else tensor))


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that autograd can save: those of inference mode are copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def procedural_inputs(model: nn.Module, example: Inputs, count: int, seed: int = 0) -> Inputs:
    """``count`` samples of the shapes and types of ``example``: dead leaves of zero mean and unit variance for images
    (n, C, H, W), normal numbers for other floats, whole numbers and masks drawn from those of the example.

    No input has to do with another in them, so that real ones are better wherever inputs belong together.

    Raises:
        SharefoldError: other tensors than ``forward`` takes.
    """
    random = torch.Generator().manual_seed(seed)

    def made(place: int, like: Tensor) -> Tensor:
        shape = (count, *like.shape[1:])
        if not like.is_floating_point():
            known = like.detach().cpu().flatten()
            return known[torch.randint(len(known), shape, generator=random)]
        if like.ndim != 4:
            return torch.randn(shape, generator=random)
        leaves = dead_leaves(count, (like.shape[2], like.shape[3]), like.shape[1], seed + place)
        return (leaves - leaves.mean()) / leaves.std()

    check_count(model, example, "calibration")
    return Inputs([made(place, like) for place, like in enumerate(example.tensors)])
