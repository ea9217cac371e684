"""What a piece of work may take."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def within(*, kilobytes: int, seconds: float) -> Iterator[None]:
    """Fails when the work inside raises this process's peak of memory by as much, or takes as many CPU seconds."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < kilobytes
    assert time.process_time() - start < seconds
