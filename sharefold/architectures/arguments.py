"""The text form of a named source: ``timm:NAME``, ``tv:NAME``, ``timm:NAME:k=v,...``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from sharefold.errors import SharefoldError

_KEY = re.compile(r"[A-Za-z_]\w*")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def parse_options(text: str, where: str) -> dict[str, Any]:
    """``"reuse=14,drop=0.1,flag=true"`` -> ``{"reuse": 14, "drop": 0.1, "flag": True}``.

    Integers, floats, ``true``/``false``, ``none`` and plain texts are told apart by their form; nothing is evaluated.

    Raises:
        SharefoldError: an item is not ``key=value``, or a key comes twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        key, equals, value = item.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key) or not value.strip():
            raise SharefoldError(f"bad option {item!r} in {where}: write key=value, separated by commas")
        if key in options:
            raise SharefoldError(f"option {key!r} comes twice in {where}: give it once")
        options[key] = parse_value(value.strip())
    return options


def parse_value(text: str) -> Any:
    """One literal: int, float, bool, None, else the text itself."""
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return float(text)
    return text


def close_matches(name: str, known: Iterable[str], count: int = 3) -> str:
    """``"did you mean a, b?"``, or ``""`` when nothing is near."""
    found = difflib.get_close_matches(name.lower(), list(known), n=count, cutoff=0.6)
    return f"did you mean {', '.join(found)}?" if found else ""
