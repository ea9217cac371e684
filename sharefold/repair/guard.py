"""One guard for all repairs: each is kept only where the converted network comes nearer to the original, else it is undone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sharefold.outputs import Comparison
from sharefold.repair.partial import Partial, best_start
from sharefold.state_dicts import load_tensors, saved_tensors


@dataclass(frozen=True)
class StepRecord(Mapping[str, Any]):
    """What one step did; as a mapping, what the JSON of ``convert`` holds of it.

    Attributes:
        name: of the step.
        kept: whether the network holds its result.
        reason: why it did not run; "" where it did.
        kl_before, kl_after: divergence from the original on the images that decide (of a classifier KL(original || converted),
            nats); None where it was not measured.
        seconds: wall-clock.
        details: what else the step has to say, JSON values.
    """

    name: str
    kept: bool
    reason: str = ""
    kl_before: float | None = None
    kl_after: float | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what was not measured is left out."""
        measured = {"reason": self.reason or None, "kl_before": self.kl_before, "kl_after": self.kl_after}
        return {"kept": self.kept, **{key: value for key, value in measured.items() if value is not None}, **self.details}

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


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

    def attempt(self, model: nn.Module, name: str, change: Callable[[], Mapping[str, Any] | Partial | None]) -> StepRecord:
        """Runs ``change``, which writes into ``model`` and returns details (None: it could not), and keeps or undoes it.

        What changes layer by layer returns a :class:`Partial`: where all of it does harm, its first layers may still help.
        """
        start = time.perf_counter()
        before = self.current(model)
        saved = saved_tensors(model)
        kept = False
        try:
            done = change()
            if done is None:
                return StepRecord(name, False, "it has no finite solution", before, None, time.perf_counter() - start)
            after = self.divergence(model)
            kept = self.better(after, before)
            if isinstance(done, Partial):
                details, kept, after = self._first_layers(model, done, before, after)
            else:
                details = done
        finally:
            if not kept:
                load_tensors(model, saved)
        self._now = after if kept else before
        return StepRecord(name, kept, "", before, after, time.perf_counter() - start, details)

    def _first_layers(
        self, model: nn.Module, done: Partial, before: float, after: float
    ) -> tuple[Mapping[str, Any], bool, float]:
        """(details, whether something is kept, divergence): of all layers, of the first of them, or of nothing."""
        if self.better(after, before):
            return done.details(done.count), True, after
        count, least = best_start(done, lambda: self.divergence(model), self.better, before)
        return done.details(count), count > 0, least if count else after
