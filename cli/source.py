"""SOURCE and its options, and how pixels become its input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    from sharefold.sources import Source
    from sharefold.sources.twins import Look


@dataclass(frozen=True)
class SourceOptions:
    """What the user said about the network."""

    source: str
    arch: str | None = None
    pretrained: bool = True
    num_classes: int | None = None
    in_chans: int | None = None
    trust_pickle: bool = False

    def open(self, look: Look | None = None) -> Source:
        """The network in eval mode, ready to be used.

        Args:
            look: images that tell architectures with the same tensors apart.

        Raises:
            SharefoldError: as :func:`sharefold.sources.open_source`.
        """
        from sharefold.sources import open_source

        return open_source(
            self.source,
            arch=self.arch,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            in_chans=self.in_chans,
            trust_pickle=self.trust_pickle,
            look=look,
        )

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
    @click.option("--arch", help="Architecture of a bare state dict (timm:NAME or tv:NAME).  [default: matched]")
    @click.option("--pretrained/--no-pretrained", default=True, show_default=True, help="Weights of a named source.")
    @click.option("--num-classes", type=click.IntRange(min=1), help="Classes of the last layer.")
    @click.option("--in-chans", type=click.IntRange(min=1), help="Channels of the input, for a named source.")
    @click.option("--trust-pickle", is_flag=True, help="Run the code in a pickled checkpoint.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        source: str,
        arch: str | None,
        pretrained: bool,
        num_classes: int | None,
        in_chans: int | None,
        trust_pickle: bool,
        **kwargs: Any,
    ) -> None:
        function(*args, source=SourceOptions(source, arch, pretrained, num_classes, in_chans, trust_pickle), **kwargs)

    return wrapper


class Numbers(click.ParamType):
    """``0.5,0.5,0.5`` as a tuple of floats."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.485,0.456,0.406", param, ctx)


def preprocess_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds ``--mean --std --input-size``, which override the model's own configuration."""
    for option in (
        click.option("--mean", type=Numbers(), help="Mean a channel, in [0, 1].  [default: the model's]"),
        click.option("--std", type=Numbers(), help="Standard deviation a channel.  [default: the model's]"),
        click.option("--input-size", metavar="C,H,W", help="Input size.  [default: the model's]"),
    )[::-1]:
        function = option(function)
    return function
