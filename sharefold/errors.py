"""The two ways sharefold talks to its user when something is off."""

import difflib
from collections.abc import Iterable


class SharefoldError(Exception):
    """Bad input or an impossible request: one line that says what, where and what to do (command line: exit code 2)."""


class SharefoldWarning(UserWarning):
    """Something was ignored or adjusted; the result is still valid."""


def unknown(what: str, name: str, known: Iterable[str]) -> SharefoldError:
    """The refusal of a ``name`` that is none of ``known``; says the nearest and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return SharefoldError(f"unknown {what} {name!r}{hint}: choose one of {', '.join(names)}")
