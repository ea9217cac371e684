"""Image files by the formats that are meant: Pillow knows others, and starts Ghostscript for one of them."""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import EpsImagePlugin, Image

from sharefold.errors import SharefoldError
from sharefold.untrusted import printable

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
# Pillow's modes of one number a pixel of more than 8 bits: its own `convert` cuts them off at 255.
DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
_TIFF_BITS, _TIFF_KIND = 258, 262  # tags: bits a pixel; 0 in the other one says that 0 is white
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


def loaded_image(path: str | Path) -> Image.Image:
    """The image in ``path``, decoded, in its own mode. Raises as :func:`opened_image`."""
    with opened_image(Path(path)) as image:
        image.load()
        return image


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """``image`` in Pillow's ``mode`` "L" or "RGB", of 8 bits a channel. Grey of 16 bits is scaled: 65535 becomes 255.

    Raises:
        SharefoldError: grey of 32 bits or of floats, which does not say what number is white.
    """
    if image.mode not in DEEP:
        return image.convert(mode)
    name = getattr(image, "filename", "") or getattr(getattr(image, "fp", None), "name", "") or "an image"
    white = _white(image)
    if white is None:
        kind = "floats" if image.mode == "F" else "32-bit numbers"
        raise SharefoldError(
            f"{printable(str(name))}: its pixels are {kind}, and nothing says which of them is white: save it as an image of "
            "8 or 16 bits, 0 for black"
        )
    values = np.asarray(image).astype(np.uint32)
    if image.format == "TIFF" and _tag(image, _TIFF_KIND) == 0:
        values = white - values
    return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8)).convert(mode)


def _white(image: Image.Image) -> int | None:
    """The number that is white in an image of a mode of :data:`DEEP`; None where the file does not say."""
    if image.mode.startswith("I;16"):
        bits = _tag(image, _TIFF_BITS) if image.format == "TIFF" else 16
        return (1 << bits) - 1
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else None  # Pillow reads 16 bits into 32 there


def _tag(image: Any, tag: int) -> int:
    value = image.tag_v2[tag]
    return int(value[0] if isinstance(value, tuple) else value)


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
