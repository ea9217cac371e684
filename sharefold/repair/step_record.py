"""What a step of a conversion has done, as the record that the JSON, the saved configuration, the card and the report show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.untrusted import is_int, is_number, shown

NOT_FINITE = "the divergence after it was not finite"


# The step of `sharefold.round_`, which is compared with the network before it and not with the original.
ROUND = "round"


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
        images: how many images the divergences were taken on: in a conversion the decide images and as many views of them;
            0 where nothing was measured.
    """

    name: str
    kept: bool
    reason: str = ""
    kl_before: float | None = None
    kl_after: float | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
    images: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what was not measured is left out."""
        measured = {
            "reason": self.reason or None, "kl_before": self.kl_before, "kl_after": self.kl_after, "images": self.images or None,
        }  # fmt: skip
        return {"kept": self.kept, **{key: value for key, value in measured.items() if value is not None}, **self.details}

    def __getitem__(self, key: str) -> Any:
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())

    def compact(self) -> dict[str, Any]:
        """For a saved configuration: no details, six digits, finite numbers alone."""
        before, after = (_six_digits(value) for value in (self.kl_before, self.kl_after))
        reason = NOT_FINITE if after is None and self.kl_after is not None and not self.reason else self.reason
        told = {"reason": reason or None, "kl_before": before, "kl_after": after, "images": self.images or None}
        return {"name": self.name, "kept": self.kept, **{key: value for key, value in told.items() if value is not None}}

    @property
    def outcome(self) -> str:
        """In a word or two, for people: kept, undone, or not run."""
        ran = self.kl_before is not None or self.kl_after is not None or self.reason == NOT_FINITE
        return "kept" if self.kept else "undone" if ran else "not run"

    @property
    def numbers(self) -> tuple[str, str]:
        """The divergences before and after, for people; "" for what was not measured."""
        before, after = ("" if value is None else f"{value:.4g}" for value in (self.kl_before, self.kl_after))
        return before, after


def steps_from(data: Any, where: str | Path) -> tuple[StepRecord, ...]:
    """The records in a list of :meth:`StepRecord.compact`, from a file that anybody may have written.

    Raises:
        SharefoldError: no list of objects, or a field of another type.
    """
    if data is None:
        return ()
    if not isinstance(data, list):
        raise _wrong(where, "steps", "a list of objects", data)
    return tuple(_record(entry, where) for entry in data)


def _record(data: Any, where: str | Path) -> StepRecord:
    if not isinstance(data, dict):
        raise _wrong(where, "steps", "a list of objects", data)
    name, kept, reason, images = data.get("name"), data.get("kept"), data.get("reason", ""), data.get("images", 0)
    if not isinstance(name, str):
        raise _wrong(where, "name of a step", "a text", name)
    if not isinstance(kept, bool):
        raise _wrong(where, f"kept of step {shown(name)}", "true or false", kept)
    if not isinstance(reason, str):
        raise _wrong(where, f"reason of step {shown(name)}", "a text", reason)
    if not is_int(images) or images < 0:
        raise _wrong(where, f"images of step {shown(name)}", "a whole number from 0 on", images)
    for key in ("kl_before", "kl_after"):
        if data.get(key) is not None and not is_number(data[key]):
            raise _wrong(where, f"{key} of step {shown(name)}", "a finite number", data[key])
    return StepRecord(name, kept, reason, data.get("kl_before"), data.get("kl_after"), images=images)


def measured_on(steps: Sequence[StepRecord]) -> str:
    """A sentence for people: from what and on which images the divergences of ``steps`` were taken; "" where there are none."""
    counts = sorted({step.images for step in steps if step.images})
    if not counts:
        return ""
    number = " or ".join(f"{count:,}" for count in counts)
    whom = "network before it was rounded" if any(step.name == ROUND for step in steps) else "original"
    return (
        f"Divergence from the {whom} on {number} decide images, their views included where they have any. They also chose what "
        "is kept, so that it may be larger on new ones."
    )


def _six_digits(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _wrong(where: str | Path, what: str, wanted: str, found: Any) -> SharefoldError:
    return SharefoldError(f"{where}: {what} in its configuration must be {wanted}, not {shown(found)}")
