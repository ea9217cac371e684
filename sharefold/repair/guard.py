"""One guard for all repairs: each is kept only where the converted network comes nearer to the original, else it is undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from sharefold.outputs import Comparison
from sharefold.repair.partial import Partial, best_start, best_way
from sharefold.repair.step_record import StepRecord
from sharefold.state_dicts import trial


class Scaled(Protocol):
    """Something about a network that is settled anew in every state of it.

    Attributes:
        divergence: of the state that was settled last, where settling has measured it; None after ``undo``.
    """

    divergence: float | None

    def settle(self) -> object: ...

    def undo(self) -> None: ...


def _scaled(done: Mapping[str, Any] | Partial, scales: Scaled) -> Mapping[str, Any] | Partial:
    """``done`` whose states are settled as well."""
    if not isinstance(done, Partial):
        return done

    def keep(count: int) -> None:
        scales.undo()
        done.keep(count)
        scales.settle()

    def go(share: float) -> None:
        assert done.go is not None
        scales.undo()
        done.go(share)
        scales.settle()

    return replace(done, keep=keep, go=None if done.go is None else go)


class Guard:
    """Compares conversions of one network by their divergence from it.

    Args:
        comparison: with the dense network, on images that no fit has seen.
        now: divergence of the network as it is, where that is known already.
    """

    def __init__(self, comparison: Comparison, now: float | None = None) -> None:
        self.comparison = comparison
        self._now = now

    def divergence(self, model: nn.Module) -> float:
        """Of ``model`` from the original: for a classifier the mean KL(original || model), nats."""
        return self.comparison.divergence(model).mean

    def settled(self, model: nn.Module, scales: Scaled | None) -> float:
        """Of ``model`` as ``scales`` has settled it; the network is run only where settling has not measured it."""
        known = None if scales is None else scales.divergence
        return self.divergence(model) if known is None else known

    def better(self, after: float, before: float) -> bool:
        """Whether ``after`` is lower than ``before`` by more than rounding."""
        return self.comparison.better(after, before)

    def current(self, model: nn.Module) -> float:
        """Of the network that the steps so far have left; measured once."""
        if self._now is None:
            self._now = self.divergence(model)
        return self._now

    def settle(self, divergence: float) -> None:
        """Takes note of the divergence that a step which guards itself has left."""
        self._now = divergence

    @property
    def images(self) -> int:
        """How many images the divergences are taken on."""
        return len(self.comparison.images)

    def attempt(
        self, model: nn.Module, name: str, change: Callable[[], Mapping[str, Any] | Partial | StepRecord | None],
        scales: Scaled | None = None,
    ) -> StepRecord:  # fmt: skip
        """Runs ``change``, which writes into ``model`` and returns details (None: it could not), and keeps or undoes it.

        ``scales`` gives every state of the network its own best scale before it is compared.

        What changes layer by layer returns a :class:`Partial`: where all of it does harm, its first layers may still help. What
        has judged itself by this guard returns its record, and its network stays.
        """
        start = time.perf_counter()
        before = self.current(model)
        with trial(model) as tried:
            done = change()
            if isinstance(done, StepRecord):
                tried.keep()
                return done
            if done is None:
                reason = "it has no finite solution"
                return StepRecord(name, False, reason, before, None, time.perf_counter() - start, images=self.images)
            if scales is not None:
                scales.settle()
                done = _scaled(done, scales)
            after = self.settled(model, scales)
            kept = self.better(after, before)
            details: Mapping[str, Any]
            if isinstance(done, Partial):
                details, kept, after = self._first_layers(lambda: self.settled(model, scales), done, before, after)
            else:
                details = done
            if kept:
                tried.keep()
        self._now = after if kept else before
        return StepRecord(name, kept, "", before, after, time.perf_counter() - start, details, self.images)

    def watch(self, model: nn.Module, name: str, change: Callable[[], Mapping[str, Any]]) -> StepRecord:
        """As :meth:`attempt` for what was asked for and stays whatever it does: the record tells what it has cost."""
        start = time.perf_counter()
        before = self.current(model)
        self._now = None  # from here on; the change may have measured what it leaves
        details = change()
        return StepRecord(name, True, "", before, self.current(model), time.perf_counter() - start, details, self.images)

    def _first_layers(
        self, divergence: Callable[[], float], done: Partial, before: float, after: float
    ) -> tuple[Mapping[str, Any], bool, float]:
        """(details, whether something is kept, divergence): of all layers, of a part of the way, of the first layers, or of
        nothing."""
        if self.better(after, before):
            return done.details(done.count), True, after
        share, nearest = best_way(done, divergence, self.better, before)
        count, least = best_start(done, divergence, self.better, nearest)
        if share and not count:
            assert done.go is not None
            done.go(share)
            return {**done.details(done.count), "way": share}, True, nearest
        return done.details(count), count > 0, least if count else after
