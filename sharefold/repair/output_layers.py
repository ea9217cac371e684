"""The layers whose outputs are those of the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.inputs import Input
from sharefold.outputs import OutputReading
from sharefold.outputs.leaves import tensors_of
from sharefold.outputs.taps import listening
from sharefold.running import evaluating, run_on


def output_layers(
    reading: OutputReading, model: nn.Module, images: Input, wanted: Callable[[nn.Module], bool]
) -> dict[str, nn.Module]:
    """Layers, of those that are ``wanted``, that run once and whose output is one of the network's, by its name; in one run."""
    sources = {leaf.source for leaf in reading.leaves}
    with ExitStack() as stack:
        layers = [module for module in model.modules() if wanted(module)]
        runs = [(layer, stack.enter_context(watched(layer))) for layer in layers]
        stack.enter_context(evaluating(model))
        seen = stack.enter_context(listening(model, reading.taps))
        output = run_on(model, images)
        returned = tensors_of(seen if reading.taps else output)
    once = [(layer, run[0][1]) for layer, run in runs if len(run) == 1]
    return {
        name: layer for name, tensor in returned.items() if name in sources for layer, given in once if _is_view(given, tensor)
    }


def _is_view(output: Any, returned: Tensor) -> bool:
    """Whether what the network returns is all of a layer's output, in whatever shape and order."""
    if not isinstance(output, Tensor) or output.numel() != returned.numel():
        return False
    if output.untyped_storage().data_ptr() == returned.untyped_storage().data_ptr():
        return True
    return output.shape == returned.shape and torch.equal(output, returned)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of every run of ``module``."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any], output: Tensor) -> None:
        seen.append((next(iter((*inputs, *named.values()))), output))

    handle = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
