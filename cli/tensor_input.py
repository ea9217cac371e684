"""``tensors:FILE`` on the command line: for whom it is, which options of images do not go with it, what it gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    from torch import nn

    from sharefold.data import InputsDataset, TensorFile
    from sharefold.inputs import Input

# Options, by the names of their parameters, that say how images are read.
_OF_IMAGES = ("mean", "std", "input_size", "split", "calib_split", "calib_resize", "truth", "augment", "auto_augment")


def tensor_file(spec: str | None) -> TensorFile | None:
    """What ``tensors:FILE`` holds; None where ``spec`` names other data, or none.

    Raises:
        SharefoldError: as :func:`sharefold.data.read_tensors`; options of the running command that have no effect on tensors.
    """
    from sharefold.data import is_tensors, read_tensors

    if spec is None or not is_tensors(spec):
        return None
    context = click.get_current_context()
    for parameter in context.command.params:
        given = parameter.name and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        if given and parameter.name in _OF_IMAGES:
            raise SharefoldError(f"{parameter.opts[0]} is for images: data {spec} is taken as it is: leave it out")
    return read_tensors(spec)


def tensors_alone(spec: str | None) -> TensorFile | None:
    """As :func:`tensor_file`, where nothing but tensors is of use.

    Raises:
        SharefoldError: other data.
    """
    found = tensor_file(spec)
    if spec is not None and found is None:
        raise SharefoldError(f"--data {spec}: this verb needs no images: give tensors:FILE, or leave it out")
    return found


def drawn(samples: InputsDataset, count: int, seed: int) -> Input:
    """At most ``count`` of the inputs, a seeded choice in their order."""
    from sharefold.data.calibration import subset

    return samples.batch(subset(len(samples), count, seed))[0]


def size_of(inputs: Input) -> dict[str, tuple[int, ...]]:
    """The ``input_size`` (C, H, W) of inputs (n, C, H, W), at which everybody counts from then on; nothing of others."""
    from torch import Tensor

    return {"input_size": tuple(inputs.shape[1:])} if isinstance(inputs, Tensor) and inputs.ndim == 4 else {}


def check_takes_images(model: nn.Module, option: str, size: Sequence[int] | None = None) -> None:
    """Checks that a network can be given images: one input, of such a shape.

    Args:
        option: by which it could be given tensors.
        size: (C, H, W) of an image that is tried; of networks of unknown classes, which may take anything.

    Raises:
        SharefoldError: it takes several inputs, signals or volumes, or fails on that image.
    """
    import torch

    from sharefold.graph.layers import input_shapes
    from sharefold.graph.preserved import tried
    from sharefold.inputs import parameters_of
    from sharefold.running import device_of, dtype_of

    names, needed, _ = parameters_of(model)
    shapes = input_shapes(model)
    if needed > 1 or 4 not in shapes:
        wanted = f"several inputs ({', '.join(names[:needed])})" if needed > 1 else " or ".join(shapes.values())
        raise SharefoldError(f"{type(model).__name__} takes {wanted}: give samples of them as {option} tensors:FILE")
    if size is None:
        return
    _, error = tried(model, torch.zeros(1, *size, device=device_of(model), dtype=dtype_of(model)))
    if error:
        raise SharefoldError(
            f"{type(model).__name__} fails on an image of {'x'.join(map(str, size))} ({error}): give samples of what it takes as "
            f"{option} tensors:FILE, or the size of its images as --input-size"
        )


def shape_of(inputs: Input) -> list[Any]:
    """Shape of a sample, of several inputs one after another; for JSON."""
    from sharefold.inputs import each_of

    shapes = [list(tensor.shape[1:]) for tensor in each_of(inputs)]
    return shapes[0] if len(shapes) == 1 else shapes


def shape_words(inputs: Input) -> str:
    """``1x8x8, 4``, for people."""
    from sharefold.inputs import each_of

    return ", ".join("x".join(map(str, tensor.shape[1:])) or "1" for tensor in each_of(inputs))
