"""Names and shapes of a network's tensors: comparing two sets, and loading one into the other."""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.state_dicts import load_tensors

Shapes = dict[str, tuple[int, ...]]
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Difference:
    """What keeps a state dict from an architecture. ``mismatched``: (name, shape in the file, shape in the network)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.mismatched)

    def __str__(self) -> str:
        parts = []
        for what, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {what}, first {names[0]}")
        if self.mismatched:
            name, here, there = self.mismatched[0]
            count = len(self.mismatched)
            parts.append(f"{count} of other shape, first {name} {list(here)} in the file, {list(there)} in the network")
        return "; ".join(parts) or "nothing differs"


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def compare(state: Shapes, model: nn.Module) -> Difference:
    """How the tensors of a file differ from those of ``model``; buffers that the file leaves out do not count.

    Counters (``num_batches_tracked``) and constant tables come and go between library versions, so a buffer is
    neither missing nor, when it is none of the network's parameters and named like a buffer, unexpected.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    target = shapes_of(model.state_dict())
    leaves = buffer_leaves(model)
    missing = tuple(name for name in target if name not in state and name in parameters)
    unexpected = tuple(name for name in state if name not in target and name.rpartition(".")[2] not in leaves)
    mismatched = tuple(
        (name, shape, target[name]) for name, shape in state.items() if name in target and shape != target[name]
    )
    return Difference(missing, unexpected, mismatched)


def buffer_leaves(model: nn.Module) -> set[str]:
    """Last name parts of the model's buffers, non-persistent ones included, and the counters of any BatchNorm."""
    leaves = {name.rpartition(".")[2] for name, _ in model.named_buffers(remove_duplicate=False)}
    return leaves | {_COUNTER}


def check_fit(model: nn.Module, shapes: Shapes, where: str, name: str, skip: Container[str] = ()) -> None:
    """Refuses tensors of ``shapes`` that ``model``, which may be on the meta device, cannot take.

    Raises:
        SharefoldError: a tensor is missing, left over, or of another shape; one line with the first of each.
    """
    here = {key: shape for key, shape in shapes.items() if key not in skip}
    kept = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key in skip}
    difference = compare({**here, **kept}, model)
    if len(difference):
        raise SharefoldError(f"{where} does not fit {name}: {difference}: choose another --arch, or leave it out")


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], where: str, name: str, skip: Container[str] = ()
) -> list[str]:
    """Copies ``state`` into ``model``, all or nothing; tensors in ``skip`` are left as they are.

    Returns:
        Names of buffers that the file did not hold and that keep their built-in values; step counters are not listed.

    Raises:
        SharefoldError: a tensor is missing, left over, or of another shape; one line with the first of each.
    Warns:
        SharefoldWarning: running statistics of a normalisation are among the absent buffers.
    """
    check_fit(model, shapes_of(state), where, name, skip)
    target = model.state_dict()
    state = {key: tensor for key, tensor in state.items() if key not in skip}
    kept = [key for key in target if key in skip]
    present = {*state, *kept}
    absent = [key for key in target if key not in present and not key.endswith(_COUNTER)]
    load_tensors(model, {key: tensor for key, tensor in state.items() if key in target}, strict=False)
    lost = [key for key in absent if key.endswith(_STATISTICS)]
    if lost:
        warnings.warn(
            f"{where} holds no running statistics for {len(lost)} buffers, first {lost[0]}: they stay at mean 0, "
            "variance 1; re-estimate them with calibration images",
            SharefoldWarning,
            stacklevel=2,
        )
    return absent
