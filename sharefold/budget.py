"""Budgets as users write them: ``50%``, ``2.1M``, ``8MB``, ``60% MACs``, ``4ms``; several at once: ``50%, 70% MACs``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sharefold.errors import SharefoldError

_COUNT = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
# What the word behind a number says is counted.
_WORDS = {"parameters": "parameters", "params": "parameters", "macs": "macs", "latency": "seconds"}
# What a bound is of, for messages.
_BOUNDED = {"parameters": "parameters", "bytes": "bytes of the file", "macs": "multiply-accumulates", "seconds": "time"}
# Commas inside of numbers, as in 2,100,000, come before three digits.
_COMMA = re.compile(r",(?!(?<=\d,)\d{3}(?!\d))")
# Far beyond any network or patience; what is larger would overflow later.
LARGEST = 1e18
_HINT = (
    "write a share (50%), parameters (2.1M), bytes of the file (8MB), multiply-accumulates (40M MACs or 50% MACs) or "
    "time for an image (4ms or 60% latency)"
)


@dataclass(frozen=True)
class Budget:
    """An upper bound of what ``unit`` counts in the whole model.

    Attributes:
        value: an amount, or with ``share`` a fraction of the dense model's, 0 to 1.
        unit: ``"parameters"``, ``"bytes"`` (of the file), ``"macs"`` or ``"seconds"``.
        text: as the user wrote it.
    """

    value: float
    unit: str
    text: str
    share: bool = False

    def limit(self, total: float) -> float:
        """The bound for a dense model of ``total``; parameters and multiply-accumulates are whole numbers."""
        limit = self.value * total if self.share else self.value
        return limit if self.unit == "seconds" else int(limit)


def parse_budget(budget: str | float | Budget) -> Budget:
    """Reads a budget: a share (``"50%"``, 0.5), parameters (``"2.1M"``, 94400), bytes (``"8MB"``), multiply-accumulates
    (``"40M MACs"``, ``"50% MACs"``) or time (``"4ms"``, ``"60% latency"``).

    Raises:
        SharefoldError: not one of these, or not positive.
    """
    if isinstance(budget, Budget):
        return budget
    text = str(budget).strip()
    pattern = r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[a-z]*?)\s*(parameters|params|macs|latency|)"
    match = re.fullmatch(pattern, text.replace("_", "").replace(",", ""), re.I)
    if not match:
        raise SharefoldError(f"budget {text!r} is not understood: {_HINT}")
    number, suffix, word = float(match[1]), match[2].lower(), match[3].lower()
    if number <= 0:
        raise SharefoldError(f"budget {text!r} is not positive: {_HINT}")
    if number > LARGEST:
        raise SharefoldError(f"budget {text!r} is larger than any network: {_HINT}")
    unit = _WORDS.get(word, "parameters")
    if suffix == "%" or (suffix == "" and number < 1 and not word):
        number /= 100 if suffix == "%" else 1
        if number > 1:
            raise SharefoldError(f"budget {text!r} is more than the whole model: {_HINT}")
        return Budget(number, unit, text, share=True)
    if suffix in _SECONDS and unit == ("seconds" if word else "parameters"):
        return Budget(number * _SECONDS[suffix], "seconds", text)
    if suffix in _COUNT and suffix != "b" and unit != "seconds":
        return Budget(number * _COUNT[suffix], unit, text)
    if suffix in _BYTES and not word:
        return Budget(number * _BYTES[suffix], "bytes", text)
    raise SharefoldError(f"budget {text!r} has the unknown unit {' '.join((match[2] + ' ' + match[3]).split())!r}: {_HINT}")


@dataclass(frozen=True)
class Budgets:
    """Upper bounds that hold together, each of another unit.

    Attributes:
        parts: one or more, as the user ordered them.
    """

    parts: tuple[Budget, ...]

    @property
    def text(self) -> str:
        """As a user writes it."""
        return ", ".join(part.text for part in self.parts)

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(part.unit for part in self.parts)


def parse_combined(budget: str | float | Budget | Budgets) -> Budgets:
    """Reads one budget, or several of different units with commas between them: ``"50%, 70% MACs"``, ``"2MB, 4ms"``.

    Raises:
        SharefoldError: a part is not what :func:`parse_budget` reads, or empty, or bounds the same as another one.
    """
    if isinstance(budget, Budgets):
        return budget
    if isinstance(budget, Budget):
        return Budgets((budget,))
    whole = str(budget).strip()
    texts = [text.strip() for text in _COMMA.split(whole)]
    if len(texts) > 1 and "" in texts:
        raise SharefoldError(f"budget {whole!r} has an empty part: leave out the comma, or write for example 50%, 4ms")
    parts = tuple(parse_budget(budget if len(texts) == 1 else text) for text in texts)
    for index, part in enumerate(parts):
        for other in parts[:index]:
            if part.unit == other.unit:
                both = f"by {other.text} and by {part.text}"
                raise SharefoldError(f"budget {whole!r} bounds the {_BOUNDED[part.unit]} twice, {both}: give one of them")
    return Budgets(parts)


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
    if number > LARGEST:
        raise SharefoldError(f"refine {str(effort)[:40]!r} would never end: write epochs (20), a time (240s, 4m) or auto")
    if number == 0:
        return None
    return Effort(epochs=int(number)) if match[2] == "" else Effort(seconds=number * (60 if match[2] == "m" else 1))
