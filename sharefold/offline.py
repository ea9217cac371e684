"""Working without a network: the Hub's client uses its cache, or fails at once."""

from __future__ import annotations

import contextlib
import importlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def offline_when_unreachable() -> Iterator[None]:
    """Without a network the Hub's client retries for most of a minute; this makes it use its cache or fail at once.

    Only a host name that does not resolve counts as no network; behind a proxy nothing is assumed.
    """
    constants: Any = importlib.import_module("huggingface_hub.constants")
    host = urllib.parse.urlparse(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or urllib.request.getproxies() or _resolves(host):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


def _resolves(host: str) -> bool:
    try:
        return bool(socket.getaddrinfo(host, 443))
    except OSError:
        return False
