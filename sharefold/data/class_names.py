"""What classes data name and which numbers they have: a class that is missing moves all that follow it, and nothing fails."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.untrusted import shown

_DEEPEST = 8  # wrappers around a data set: a loader, a subset, a reader of another library


def joined_classes(own: Collection[str], others: Collection[Collection[str]]) -> list[str]:
    """The class names of one split in the order of their numbers, among those of the splits beside it.

    Args:
        own: the names in this split.
        others: those in each other split. One that has no name in common with the rest is of something else (a folder
            ``images`` of pictures without classes), and does not count.
    """
    found, left = set(own), [set(names) for names in others]
    while near := [names for names in left if names & found]:
        found.update(*near)
        left = [names for names in left if names not in near]
    return sorted(found)


def class_numbers(data: Any) -> dict[str, int] | None:
    """Class name -> label, of a data set or a loader; None where the data does not name its classes."""
    for _ in range(_DEEPEST):
        numbers = getattr(data, "class_to_idx", None)
        if isinstance(numbers, Mapping) and all(isinstance(number, int) for number in numbers.values()):
            return {str(name): number for name, number in numbers.items()}
        names = getattr(data, "classes", None)
        if isinstance(names, (list, tuple)) and len(set(map(str, names))) == len(names):
            return {str(name): number for number, name in enumerate(names)}
        data = next((getattr(data, name) for name in ("dataset", "reader") if hasattr(data, name)), None)
    return None


def check_same_numbers(train: Any, val: Any) -> None:
    """
    Raises:
        SharefoldError: a class of both has another number in each.
    """
    ours, theirs = class_numbers(train) or {}, class_numbers(val) or {}
    moved = next((name for name in ours if name in theirs and ours[name] != theirs[name]), None)
    if moved is not None:
        lacking = sorted(ours.keys() ^ theirs.keys())
        why = f" (only one of them has {', '.join(map(shown, lacking[:3]))})" if lacking else ""
        raise SharefoldError(
            f"finetune: {shown(moved)} is class {ours[moved]} of the training images and class {theirs[moved]} of the validation "
            f"images{why}: give both the same class folders, of which some may be empty"
        )


def warn_about_count(data: Any, outputs: int, where: str) -> None:
    """Warns where the data names fewer or more classes, numbered without gaps, than a network has outputs: labels are then
    most likely those of other classes."""
    numbers = class_numbers(data)
    if not numbers or len(numbers) == outputs or sorted(numbers.values()) != list(range(len(numbers))):
        return
    warnings.warn(
        f"{where}: the data have {len(numbers)} classes, the network has {outputs} outputs: classes are numbered in the order of "
        "their names, so that labels mean others where one is missing: complete the class folders (an empty one counts)",
        SharefoldWarning,
        stacklevel=3,
    )
