"""Freed memory stays with the process, where the C library is glibc.

A network on images of 224 x 224 makes and frees tensors of tens of megabytes in every layer. glibc takes such from the kernel and
hands them back at once, and the kernel clears every page anew: most of the time of a forward pass. Kept in the heap they are
reused. What is larger still (image sets, moments) goes back, and so does what is free beyond :data:`KEPT` at the heap's end.
https://man7.org/linux/man-pages/man3/mallopt.3.html
"""

from __future__ import annotations

import ctypes
import sys

CHOICES = ("keep", "system")
VARIABLE = "SHAREFOLD_HEAP"

LARGEST = 128 << 20  # bytes of a block that is kept
KEPT = 512 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Whether this process keeps freed blocks from now on; False where there is no glibc to tell."""
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_MMAP_THRESHOLD, LARGEST)) and bool(library.mallopt(_TRIM_THRESHOLD, KEPT))
