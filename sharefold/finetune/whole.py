"""Pivoted factors are trained whole and orthonormal, and pivoted again afterwards.

Both forms hold the same networks, and the pivoted one fewer numbers; but a step along the gradient depends on the numbers that
one steps in. With orthonormal rows a step of the coefficients moves the weight as far as it moves them, and the orthogonality
term keeps it so; from pivoted factors plain SGD learns markedly less (docs/fine-tuning.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.layers import Bank, SharedConv, banks, shared_layers, with_pivots
from sharefold.solvers.interpolative import pivot
from sharefold.store.tensor_spec import carried_spec


@contextmanager
def whole_factors(model: nn.Module) -> Iterator[None]:
    """While active, the pivoted factors of ``model`` are whole and orthonormal parameters; it computes the same.

    Afterwards, whatever happened, they are pivoted again, in as many numbers as before. Networks whose tensors are rounded
    while they train (``store`` in their configuration) stay as they are.
    """
    rounded = carried_spec(model) is not None
    every: list[Bank | SharedConv] = [*banks(model).values(), *shared_layers(model).values()]
    owners = [] if rounded else [owner for owner in every if owner.pivots is not None]
    readers = {owner: _readers(model, owner) for owner in owners}
    with torch.no_grad():
        for owner in owners:
            _make_whole(owner, readers[owner])
    try:
        yield
    finally:
        with torch.no_grad():
            for owner in owners:
                _make_pivoted(owner, readers[owner])


def _readers(model: nn.Module, owner: Bank | SharedConv) -> list[SharedConv]:
    """The layers whose coefficients multiply the factor."""
    if isinstance(owner, Bank):
        return [layer for layer in shared_layers(model).values() if layer.bank is owner]
    return [owner]


def _factor(owner: Bank | SharedConv) -> tuple[str, nn.Parameter]:
    name = owner.pivoted
    assert name is not None
    return name, cast(nn.Parameter, getattr(owner, name))


def _row_shape(owner: Bank | SharedConv, readers: list[SharedConv]) -> tuple[int, ...]:
    """The shape of a whole row of the factor; a bank is as wide as the widest layer that reads it."""
    if isinstance(owner, SharedConv):
        return owner.pivoted_shape()
    return max((layer.form for layer in readers), key=lambda form: form.features).weight_shape[1:]


def _mix(owner: Bank | SharedConv, readers: list[SharedConv], matrix: Tensor) -> None:
    for layer in readers:
        if owner is layer:
            layer.mix_own(matrix)
        else:
            layer.mix_shared(matrix)


# Both on the CPU, in float64: not every device has it, and the matrices are few and small.


def _make_whole(owner: Bank | SharedConv, readers: list[SharedConv]) -> None:
    name, free = _factor(owner)
    pivots = owner.pivots
    assert pivots is not None
    found = torch.linalg.qr(with_pivots(free.cpu(), pivots.cpu()).double().T)
    _set(owner, name, found.Q.T.reshape(-1, *_row_shape(owner, readers)), free)
    owner.pivots = None
    _mix(owner, readers, found.R.T)


def _make_pivoted(owner: Bank | SharedConv, readers: list[SharedConv]) -> None:
    name, whole = _factor(owner)
    rows = whole.detach().cpu().double().flatten(1)
    if bool(torch.isfinite(rows).all()):
        # Filters that came to depend on each other leave room for any others.
        left, sizes, orthonormal = torch.linalg.svd(rows, full_matrices=False)
        pivots, free, mix = pivot(orthonormal)
        mix = left * sizes @ mix
    else:  # a run that diverged
        count = len(rows)
        pivots, free = torch.arange(count), rows[:, count:]
        mix = torch.full((count, count), float("nan"), dtype=rows.dtype)
    _set(owner, name, free, whole)
    owner.pivots = pivots.int().to(whole.device)
    _mix(owner, readers, mix)


def _set(owner: nn.Module, name: str, value: Tensor, like: nn.Parameter) -> None:
    setattr(owner, name, nn.Parameter(value.to(like).contiguous(), requires_grad=like.requires_grad))
