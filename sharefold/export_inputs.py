"""The inputs of an exported graph: their names, their free first axis, and samples to check the file by."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.inputs import Input, Inputs, each_of, parameters_of


def random(shape: tuple[int, ...]) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def another(example: Input) -> Input:
    """Three random samples; of whole numbers and masks, which may not be any, some of the example's."""
    if isinstance(example, Inputs):
        return example.each(lambda tensor: cast(Tensor, another(tensor)))
    if not example.is_floating_point():
        return example[torch.arange(3) % len(example)]
    return random((3, *example.shape[1:])).to(example.dtype)


def free_batch(model: nn.Module, count: int) -> tuple[Any, ...]:
    """The first axis of every one of ``count`` inputs as one free number, by the parameters of ``forward``."""
    each = [{0: batch} for batch in [torch.export.Dim("batch", min=1)] for _ in range(count)]
    known = len(parameters_of(model)[0])
    if count == 1 or count <= known:
        return tuple(each)
    return *each[:known], tuple(each[known:])  # *args are one parameter


def input_names(model: nn.Module, example: Input) -> list[str]:
    """What the graph's inputs are called: ``images``, or several as ``forward`` calls them."""
    count = len(each_of(example))
    known = parameters_of(model)[0][:count]
    return ["images"] if count == 1 else [*known, *(f"input_{place}" for place in range(len(known), count))]


def named(names: list[str], batch: Input) -> dict[str, Any]:
    """The arrays of a batch as onnxruntime takes them."""
    return {name: tensor.numpy() for name, tensor in zip(names, each_of(batch), strict=True)}
