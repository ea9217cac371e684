"""Tensors of a file, just as a network takes them: ``tensors:FILE``, an .npy, .npz or .safetensors file.

Nothing is resized, normalised or unpickled. Floats become float32; whole numbers and masks stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sharefold.data.inputs_dataset import InputsDataset
from sharefold.data.npz_files import NpzFile, read_npy
from sharefold.errors import SharefoldError
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, check_count, each_of, parameters_of, shapes_of, taken
from sharefold.running import run_on
from sharefold.untrusted import expanded, first_line, printable, shown

KIND = "tensors"
LABELS = "labels"
# What numpy.savez calls arrays that were given without names: their order is meant.
_NUMBERED = re.compile(r"arr_(\d+)")
_LISTED = 6  # names in a message
# Unsigned types that torch hardly computes with.
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


@dataclass(frozen=True)
class TensorFile:
    """What a file holds, checked as far as it can be without a network.

    Attributes:
        where: for messages, ``data tensors:FILE``.
        tensors: by name, (n, ...) each, float32 or whole numbers or bool; finite.
    """

    where: str
    tensors: dict[str, Tensor]

    def of(self, model: nn.Module) -> InputsDataset:
        """The inputs of ``model``, and the labels if there are some.

        An array called ``labels`` holds classes, whole numbers (n,), unless ``forward`` has a parameter of that name. Of the
        others, arrays that are called as parameters of ``forward`` are those; one array alone is the first input; arrays
        ``arr_0``, ``arr_1`` ..., as :func:`numpy.savez` calls those without names, are the inputs in this order.

        Raises:
            SharefoldError: other names, an input is missing, labels that are none, or the network fails on the first sample, or
                on that of the least or the largest whole number.
        """
        known, _, _ = parameters_of(model)
        given = dict(self.tensors)
        labels = None if LABELS in known else given.pop(LABELS, None)
        if labels is not None and (labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool):
            raise SharefoldError(f"{self.where}: labels are {_kind(labels)} {tuple(labels.shape)}: want classes (n,)")
        if not given:
            raise SharefoldError(f"{self.where}: it holds labels alone: add what the network takes")
        inputs = taken([given[name] for name in self._order(list(given), known, type(model).__name__)])
        check_count(model, inputs, self.where)
        self._check_runs(model, inputs)
        return InputsDataset(inputs, None if labels is None else labels.long(), self.where)

    def _order(self, names: list[str], known: list[str], network: str) -> list[str]:
        """``names`` as ``forward`` takes them."""
        takes = f"forward of {network} takes {', '.join(known)}" if known else f"forward of {network} does not name its inputs"
        if known and set(names) <= set(known):
            order = [name for name in known if name in names]
            gap = next((want for want, have in zip(known, order, strict=False) if want != have), None)
            if gap is not None:
                raise SharefoldError(f"{self.where}: it holds {_listed(order)} but no {gap}, and {takes}: add {gap}")
            return order
        if len(names) == 1:
            return names
        places = {name: int(found.group(1)) for name in names if (found := _NUMBERED.fullmatch(name))}
        if sorted(places.values()) == list(range(len(names))):
            return sorted(places, key=places.__getitem__)
        odd = [name for name in names if name not in known]
        hint = f"call them {', '.join(known)}" if known else "save them without names: numpy.savez(FILE, first, second)"
        raise SharefoldError(f"{self.where}: {_listed(odd)} cannot be matched: {takes}: {hint} ({LABELS} may hold classes)")

    def _check_runs(self, model: nn.Module, inputs: Input) -> None:
        for place in _telling(inputs):
            one = inputs[place : place + 1]
            try:
                with preserved(model):
                    run_on(model, one)
            except SharefoldError:
                raise
            except Exception as error:  # networks raise what they like
                which = f"sample {place}" if place else "its first sample"
                raise SharefoldError(
                    f"{self.where}: {type(model).__name__} fails on {which}, of shape {shapes_of(one)} "
                    f"({first_line(error)}): store what forward takes, with the samples along the first axis"
                ) from None


def _telling(inputs: Input) -> list[int]:
    """Samples that a network fails on if on any: the first, and those of the least and the largest whole number, which may be
    places in a table."""
    found = {0}
    for tensor in each_of(inputs):
        if not tensor.is_floating_point() and tensor.dtype != torch.bool:
            values = tensor.flatten()
            found |= {int(place) * len(tensor) // len(values) for place in (values.argmin(), values.argmax())}
    return sorted(found)


def is_tensors(spec: object) -> bool:
    """Whether ``spec`` is ``tensors:FILE``."""
    return isinstance(spec, str) and spec.partition(":")[0] == KIND


def read_tensors(spec: str) -> TensorFile:
    """The arrays in the file that ``spec``, ``tensors:FILE``, names.

    Args:
        spec: of an ``.npy`` file (one array), an ``.npz`` or a ``.safetensors`` file (one array or several). The first axis
            counts samples; of several arrays sample belongs to sample.

    Raises:
        SharefoldError: no such file, another kind of file, a damaged one, no arrays or samples, arrays of different lengths, of
            Python objects, texts or complex numbers, NaN or infinity.
    """
    place = spec.partition(":")[2]
    where = f"data {KIND}:{printable(place)}"
    path = expanded(place)
    if not place or not path.is_file():
        problem = "it is a folder: name a file" if place and path.is_dir() else "no such file: check the path"
        raise SharefoldError(f"{where}: {problem if place else 'a file must follow the colon'}")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SharefoldError(f"{where}: want a file ending in {', '.join(_READERS)} (numpy.savez, safetensors.torch.save_file)")
    if path.stat().st_size == 0:
        raise SharefoldError(f"{where}: the file is empty (0 bytes): save it again")
    found = reader(path, where)
    if not found:
        raise SharefoldError(f"{where}: it holds no arrays: save what the network takes")
    lengths = {len(tensor) for tensor in found.values()}
    if len(lengths) > 1:
        told = ", ".join(f"{shown(name)} {len(tensor):,}" for name, tensor in list(found.items())[:_LISTED])
        raise SharefoldError(f"{where}: its arrays have different numbers of samples ({told}): the first axis counts them in all")
    return TensorFile(where, found)


def _npy(path: Path, where: str) -> dict[str, Tensor]:
    return {"arr_0": _checked(read_npy(path, where), "the array", where)}


def _npz(path: Path, where: str) -> dict[str, Tensor]:
    archive = NpzFile(path, where)
    return {name: _checked(archive.read(name), shown(name), where) for name in archive.entries}


def _safetensors(path: Path, where: str) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as handle:
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SharefoldError(f"{where}: damaged or not safetensors ({first_line(error)}): save it again") from None
    return {name: _sound(tensor, shown(name), where) for name, tensor in found.items()}


_READERS: dict[str, Callable[[Path, str], dict[str, Tensor]]] = {".npz": _npz, ".npy": _npy, ".safetensors": _safetensors}


def _checked(array: np.ndarray, name: str, where: str) -> Tensor:
    kind = array.dtype
    if kind.kind not in "biuf":
        raise SharefoldError(f"{where}: {name} is {kind}: want floats, whole numbers or booleans")
    wanted = np.float32 if kind.kind == "f" else kind.newbyteorder("=")
    with np.errstate(over="ignore"):  # what float32 cannot hold is told below
        return _sound(torch.from_numpy(np.ascontiguousarray(array, wanted).reshape(array.shape)), name, where)


def _sound(tensor: Tensor, name: str, where: str) -> Tensor:
    """``tensor`` after a check of its numbers; floats as float32, whole numbers in a type that torch computes with."""
    if tensor.is_complex():
        raise SharefoldError(f"{where}: {name} is {_kind(tensor)}: want floats, whole numbers or booleans")
    if tensor.ndim == 0:
        raise SharefoldError(f"{where}: {name} is a single number: want arrays (n, ...), a row a sample")
    if tensor.numel() == 0:
        problem = "has no samples" if len(tensor) == 0 else "has samples without a number"
        raise SharefoldError(f"{where}: {name} {problem} (shape {tuple(tensor.shape)}): store at least one")
    if not tensor.is_floating_point():
        wide = tensor.to(_WIDER.get(tensor.dtype, tensor.dtype))
        if tensor.dtype == torch.uint64 and bool((wide < 0).any()):
            raise SharefoldError(f"{where}: {name} has whole numbers beyond what int64 holds: store it as int64")
        return wide
    tensor = tensor.float()
    bad = ~torch.isfinite(tensor)
    if bool(bad.any()):
        first = int(bad.flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else int(bad.nonzero()[0])
        raise SharefoldError(
            f"{where}: {name} holds NaN, infinity or numbers beyond float32 ({int(bad.sum()):,} of them, the first in sample "
            f"{first}): check how it was made"
        )
    return tensor


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(names: list[str]) -> str:
    told = ", ".join(shown(name) for name in names[:_LISTED])
    return told if len(names) <= _LISTED else f"{told} and {len(names) - _LISTED} more"
