"""SOURCE and its options, and how pixels become its input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError
from sharefold.options import OpenOptions

from .record_options import Numbers, record_of, record_options

if TYPE_CHECKING:
    from sharefold.sources import Source
    from sharefold.sources.twins import Look


@dataclass(frozen=True)
class SourceOptions:
    """What the user said about the network."""

    source: str
    options: OpenOptions = OpenOptions()

    def open(self, look: Look | None = None) -> Source:
        """The network in eval mode, ready to be used.

        Args:
            look: images that tell architectures with the same tensors apart.

        Raises:
            SharefoldError: as :func:`sharefold.sources.open_source`.
        """
        from sharefold.sources import open_source

        return open_source(self.source, self.options, look=look)

    def beside(self, other: str) -> tuple[SourceOptions, SourceOptions]:
        """This source and ``other``; what is said of an architecture is meant for those that are no files of sharefold."""
        from sharefold.checkpoint import is_sharefold
        from sharefold.sources.own import is_own

        known = [is_sharefold(source) for source in (self.source, other)]
        if all(known):
            return self, SourceOptions(other, self.options)
        # Which class a network of the user's own is of no file knows.
        arch = self.options.arch if is_own(self.options.arch) else None
        described = replace(self.options, arch=arch, num_classes=None, in_chans=None)
        first, second = (described if shared else self.options for shared in known)
        return SourceOptions(self.source, first), SourceOptions(other, second)

    def open_dense(self, look: Look | None = None) -> Source:
        """As :meth:`open`.

        Raises:
            SharefoldError: the network is converted already.
        """
        opened = self.open(look)
        if opened.shared:
            raise SharefoldError(f"{self.source} is converted already: take the dense original, or expand it")
        return opened


def source_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the SOURCE argument and its options; the function gets ``source: SourceOptions``."""

    @click.argument("source")
    @record_options(OpenOptions)
    @functools.wraps(function)
    def wrapper(*args: Any, source: str, **kwargs: Any) -> None:
        options = record_of(OpenOptions, kwargs)
        function(*args, source=SourceOptions(source, options), **kwargs)

    return wrapper


def preprocess_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds ``--mean --std --input-size``, which override the model's own configuration."""
    for option in (
        click.option("--mean", type=Numbers(), help="Mean a channel, in [0, 1].  [default: the model's]"),
        click.option("--std", type=Numbers(), help="Standard deviation a channel.  [default: the model's]"),
        click.option("--input-size", metavar="C,H,W", help="Input size.  [default: the model's]"),
    )[::-1]:
        function = option(function)
    return function
