"""Which of some named things belongs to which picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import PurePath

from sharefold.errors import SharefoldError
from sharefold.untrusted import printable


def matched(pictures: Sequence[PurePath], named: Sequence[PurePath], key: Callable[[PurePath], str], where: str) -> list[int]:
    """For every picture the index of that of ``named`` which has the same name; where several have it, the one whose folder
    has the picture's folder's name.

    Args:
        key: what of a path is its name: with or without the suffix.
        where: for messages.

    Raises:
        SharefoldError: a picture without one, with several, or two pictures with the same.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(named):
        places[key(path)].append(index)
    found: list[int] = []
    taken: dict[int, PurePath] = {}
    for picture in pictures:
        same = places.get(key(picture), [])
        if not same:
            raise SharefoldError(f"{where}: nothing in it is named like {_text(picture)}: add it, or take the picture out")
        if len(same) > 1:
            near = [index for index in same if named[index].parent.name == picture.parent.name]
            if len(near) != 1:
                several = [_text(named[index]) for index in near or same]
                more = f" and {len(several) - 2} more" if len(several) > 2 else ""
                raise SharefoldError(
                    f"{where}: {len(several)} things in it are named like {_text(picture)}, {' and '.join(several[:2])}{more}: "
                    "keep one"
                )
            same = near
        if same[0] in taken:
            raise SharefoldError(
                f"{where}: {_text(named[same[0]])} is named like two pictures, {_text(taken[same[0]])} and {_text(picture)}: "
                "name them apart"
            )
        taken[same[0]] = picture
        found.append(same[0])
    return found


def _text(path: PurePath) -> str:
    return printable(str(path))
