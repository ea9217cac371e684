"""Budgets as users write them: ``50%``, ``2.1M``, ``400k``, ``8MB``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharefold.errors import SharefoldError

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Budget:
    """An upper bound: ``unit`` is ``"parameters"``, ``"bytes"`` or ``"share"`` (of the parameters, 0 to 1)."""

    value: float
    unit: str
    text: str

    def parameters(self, before: int) -> int:
        """The bound as a number of parameters of a model that has ``before``."""
        if self.unit == "share":
            return int(self.value * before)
        if self.unit == "bytes":
            raise ValueError("a budget in bytes depends on the stored types; ask the planner")
        return int(self.value)


def parse_budget(budget: str | float | Budget) -> Budget:
    """Reads a budget: a share (``"50%"``, 0.5), parameters (``"2.1M"``, 94400) or bytes (``"8MB"``).

    Raises:
        SharefoldError: not one of these, or not positive.
    """
    if isinstance(budget, Budget):
        return budget
    text = str(budget).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[a-z]*)", text.replace("_", "").replace(",", ""), re.I)
    hint = "write a share (50%), a number of parameters (2.1M) or bytes (8MB)"
    if not match:
        raise SharefoldError(f"budget {text!r} is not understood: {hint}")
    number, unit = float(match[1]), match[2].lower()
    if number <= 0:
        raise SharefoldError(f"budget {text!r} is not positive: {hint}")
    if unit == "%":
        number /= 100
    if unit == "%" or (unit == "" and number < 1):
        if number > 1:
            raise SharefoldError(f"budget {text!r} is more than the whole model: {hint}")
        return Budget(number, "share", text)
    if unit in _COUNT and unit != "b":
        return Budget(number * _COUNT[unit], "parameters", text)
    if unit in _BYTES:
        return Budget(number * _BYTES[unit], "bytes", text)
    raise SharefoldError(f"budget {text!r} has the unknown unit {match[2]!r}: {hint}")


@dataclass(frozen=True)
class Effort:
    """How long refinement runs: passes over the images, wall-clock seconds, or (both None) its own default."""

    epochs: int | None = None
    seconds: float | None = None


def parse_effort(effort: str | int | bool | Effort | None) -> Effort | None:
    """Reads a refinement budget: ``"20"`` or 20 epochs, ``"240s"``, ``"4m"``, ``"auto"`` or True; 0, False, None: none.

    Raises:
        SharefoldError: not one of these.
    """
    if effort is None or isinstance(effort, Effort):
        return effort
    if isinstance(effort, bool):
        return Effort() if effort else None
    text = str(effort).strip().lower()
    if text == "auto":
        return Effort()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|)", text)
    if not match or (match[2] == "" and "." in match[1]):
        raise SharefoldError(f"refine {effort!r} is not understood: write epochs (20), a time (240s, 4m) or auto")
    number = float(match[1])
    if number == 0:
        return None
    return Effort(epochs=int(number)) if match[2] == "" else Effort(seconds=number * (60 if match[2] == "m" else 1))
