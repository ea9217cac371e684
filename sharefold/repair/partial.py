"""A repair of which a part can be kept: the first layers, since errors add up with depth, or a part of the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Partial:
    """What a repair of several parts has done.

    Attributes:
        count: parts that it has changed, for example layers in forward order.
        keep: leaves the network with the changes of the first so many alone; may be called with any number in any order.
        details: for the record, where so many parts are kept.
        go: leaves the network a share of the way between what it was and what all changes made of it; None where there is nothing
            between.
    """

    count: int
    keep: Callable[[int], None]
    details: Callable[[int], Mapping[str, Any]]
    go: Callable[[float], None] | None = None


class Journal:
    """Remembers what each of several changes did to the tensors that it wrote into."""

    def __init__(self) -> None:
        self._entries: list[list[tuple[Tensor, Tensor, Tensor]]] = []  # (tensor, value before, value after)
        self._now = 0
        self._between = False

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def entry(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """A change that may write into ``tensors`` and into no others."""
        saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
        yield
        entry = [(tensor, old, tensor.detach().clone()) for tensor, old in saved if not torch.equal(tensor, old)]
        self._entries.append(entry)
        self._now = len(self._entries)

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Gives all tensors the values that they had after the first ``count`` changes."""
        if self._between:  # what the tensors hold is no state of the journal: from the start again
            self._between = False
            self._now = len(self)
            self.keep(0)
        while self._now > count:
            self._now -= 1
            for tensor, old, _ in self._entries[self._now]:
                tensor.copy_(old)
        while self._now < count:
            for tensor, _, new in self._entries[self._now]:
                tensor.copy_(new)
            self._now += 1

    @torch.no_grad()
    def go(self, share: float) -> None:
        """Gives all tensors values between those before (0) and after (1) all changes; integers those after."""
        self.keep(len(self))
        first = {id(tensor): (tensor, old) for entry in reversed(self._entries) for tensor, old, _ in entry}
        for tensor, old in first.values():
            if tensor.is_floating_point():
                tensor.copy_(old.lerp(tensor, share))
        self._between = True


WAYS = (0.5, 0.25)


def best_way(
    partial: Partial, divergence: Callable[[], float], better: Callable[[float, float], bool], before: float
) -> tuple[float, float]:
    """How far to go where all of it does harm; as :func:`best_start`, (share, divergence there); (0, ``before``) where none of
    ``WAYS`` helps, and the network is then left somewhere."""
    best, least = 0.0, before
    for share in WAYS if partial.go is not None and partial.count else ():
        assert partial.go is not None
        partial.go(share)
        now = divergence()
        if better(now, least):
            best, least = share, now
    return best, least


def best_start(
    partial: Partial, divergence: Callable[[], float], better: Callable[[float, float], bool], before: float
) -> tuple[int, float]:
    """How many layers should keep their changes where all of them together do harm: half of them, three quarters or a quarter.

    A half is tried first, then three quarters where it helps, and a quarter where it does not.

    Args:
        divergence: of the network as it is.
        better: whether the first is lower than the second by more than rounding.
        before: divergence without any change.

    Returns:
        (layers, divergence with them), which are what the network is left with; (0, ``before``) where none of this helps.
    """
    best, least = 0, before
    for quarters in (2, 3, 1):
        if (quarters == 3 and not best) or (quarters == 1 and best):
            continue
        count = partial.count * quarters // 4
        if count in (0, best):
            continue
        partial.keep(count)
        now = divergence()
        if better(now, least):
            best, least = count, now
    partial.keep(best)
    return best, least
