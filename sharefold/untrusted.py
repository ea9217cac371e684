"""Texts and values from files that anybody may have written: read with bounds, shown without their escapes."""

from __future__ import annotations

import json
import re
import reprlib
import sys
from pathlib import Path
from typing import Any

from sharefold.errors import SharefoldError

# Most bytes of a JSON text. In memory JSON takes up to thirty times its text, and the plan of a network with 1,000 groups is
# a tenth of this.
JSON_LIMIT = 1 << 22
# Nothing of ours is nested a tenth as deeply, and what walks through values (asdict, repr) recurses a few times a level.
_DEEPEST = 64
# Packed weights of few bytes may stand for many: entropy coding goes down to hundredths of a bit. Beyond this no network does.
_INFLATED, _FREE_BYTES = 1000, 1 << 26
_DIGITS = 300  # of a whole number: a float holds 308
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def read_text(file: Path, what: str, limit: int = JSON_LIMIT) -> str:
    """The text (UTF-8, with or without a byte order mark) of a file with at most ``limit`` bytes.

    Raises:
        SharefoldError: missing, unreadable, larger, or no text.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        raise SharefoldError(f"{what}: no such file") from None
    except OSError as error:
        raise SharefoldError(f"{what}: cannot be read ({error.strerror}): check its permissions") from None
    if len(data) > limit:
        raise SharefoldError(f"{what} has more than {limit >> 20} MB: it is damaged, or another file is meant")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SharefoldError(f"{what} is no text (UTF-8): it is damaged, or another file is meant") from None


def parse_json(text: str, what: str, limit: int = JSON_LIMIT) -> Any:
    """The values in a JSON text of at most ``limit`` characters.

    Raises:
        SharefoldError: larger, nested deeper than 64 levels, a whole number that no float can hold, half a character (a lone
            surrogate, which no file and no screen takes), or no JSON.
    """
    if len(text) > limit:
        raise SharefoldError(f"{what} has more than {limit >> 20} MB: it is damaged, or another file is meant")
    try:
        found = json.loads(text, parse_int=_whole)
        if _HALF_CHARACTER.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise SharefoldError(f"{what} is not JSON (line {error.lineno}: {error.msg})") from None
    except RecursionError:
        raise SharefoldError(f"{what} is not readable: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise SharefoldError(f"{what} is not readable: a text in it holds half a character (a lone surrogate)") from None
    except ValueError:
        raise SharefoldError(f"{what} is not readable: a number has more than {_DIGITS} digits") from None
    level = [found]
    for _ in range(_DEEPEST):
        level = [part for value in level if isinstance(value, (dict, list))
                 for part in (value.values() if isinstance(value, dict) else value)]  # fmt: skip
    if any(isinstance(value, (dict, list)) for value in level):
        raise SharefoldError(f"{what} is not readable: it is nested too deeply")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError("no float holds it")
    return int(digits)


def is_int(value: Any) -> bool:
    """Whether ``value`` is a whole number, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether ``value`` is a whole or floating number that a float can hold, and neither infinite nor NaN."""
    return (is_int(value) or isinstance(value, float)) and abs(value) <= sys.float_info.max


def most_inflated(held: int) -> int:
    """The most bytes of tensors that ``held`` bytes of a file may stand for."""
    return _INFLATED * held + _FREE_BYTES


class _Brief(reprlib.Repr):
    """``repr`` of a few levels and entries: that of containers which share their parts takes exponential time."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 8
        self.maxstring = self.maxlong = self.maxother = 200

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, dict):  # and those made from it, whose own repr goes all the way
            return self.repr_dict(x, level)
        try:
            return super().repr1(x, level)
        except ValueError:  # an integer of more than 4,300 digits
            return "a number of thousands of digits"


_BRIEF = _Brief()


def shown(value: Any, limit: int = 80) -> str:
    """``value`` for a message: cut off, and without control characters, which a terminal would obey."""
    text = printable(value) if isinstance(value, str) else _BRIEF.repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def quoted(value: Any, limit: int = 80) -> str:
    """As :func:`shown`, texts in quotes."""
    return shown(repr(value), limit)


def printable(text: str) -> str:
    """``text`` with every character that is no letter, sign or space written as its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What an error says, for messages of ours: its first line, printable, at most 200 characters; its type if it is silent."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:200])


def exclude_pattern(text: str | None) -> re.Pattern[str] | None:
    """What ``exclude`` asks for; None where it is not given.

    Raises:
        SharefoldError: no regular expression.
    """
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise SharefoldError(f"--exclude {quoted(text)} is not a regular expression: {error}") from None


def expanded(text: str) -> Path:
    """The path, with the reader's home folder in it where it begins with ~.

    Raises:
        SharefoldError: there is no such user.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise SharefoldError(f"{text}: there is no such home folder: write the path in full") from None
