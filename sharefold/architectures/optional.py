"""Packages that are there or not."""

from __future__ import annotations

from importlib.util import find_spec


def installed(package: str) -> bool:
    """Whether ``package`` could be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # None stands for it among the modules
        return False
