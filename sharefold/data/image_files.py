"""Image files by the formats that are meant: Pillow knows others, and starts Ghostscript for one of them."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import EpsImagePlugin, Image

from sharefold.errors import SharefoldError
from sharefold.untrusted import printable

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# What Pillow's decoders trip over in damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError, KeyError, ArithmeticError, struct.error,
           Image.DecompressionBombError)  # fmt: skip
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def opened_image(path: Path) -> Iterator[Image.Image]:
    """The image in ``path``, decoded within the block.

    Raises:
        SharefoldError: no image of :data:`FORMATS`, damaged, or of far more pixels than a photograph.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "TIFF":
                with _silent():
                    image.load()
            yield image
    except _DAMAGE as error:
        reason = printable(str(error)[:200])
        raise SharefoldError(f"{path}: not a readable image ({reason}): repair or remove it") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that C code says reaches stderr: libtiff prints a line of its own about damage, and Pillow raises besides."""
    with _ONE_AT_A_TIME:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def forbid_ghostscript() -> None:
    """For code of others that opens images of any format: Pillow then refuses EPS instead of starting a program."""
    EpsImagePlugin.gs_binary = False
