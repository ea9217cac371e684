"""Process-wide settings of torch that must not reach into planning and conversion."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.running import check_open, check_shapes, check_values, device_of, random_kept
from sharefold.tensor_values import is_expanded

# What layers and norms call the tensors that conversion writes to.
_WRITTEN = ("weight", "bias", "running_mean", "running_var")
P = ParamSpec("P")
R = TypeVar("R")


def with_plain_settings(function: Callable[P, R]) -> Callable[P, R]:
    """Runs ``function(model, ...)``, or ``function(calibration, ...)``, in :func:`plain_settings`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0] if args else kwargs.get("model", kwargs.get("cal"))
        with plain_settings(getattr(first, "original", first) if not isinstance(first, nn.Module) else first):
            return function(*args, **kwargs)

    return run


@contextmanager
def plain_settings(model: Any) -> Iterator[None]:
    """No autocast, no inference mode and no defaults of the user inside: solvers would lose digits, gradients or their tensors.
    Random numbers that are drawn inside are drawn again afterwards.

    Raises:
        SharefoldError: ``model`` is no module, compiled or a TorchScript program, has parameters without a shape or tensors
            without values, or was made in inference mode or has expanded tensors in its layers or norms, where nothing can be
            repaired.
    """
    if not isinstance(model, nn.Module):
        raise SharefoldError(f"model: {type(model).__name__} is not an nn.Module: pass the network itself")
    check_open(model)
    check_shapes(model)
    check_values(model)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise SharefoldError("model: it was made in torch.inference_mode(), which forbids changes: make or copy it outside")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.rpartition(".")[2] in _WRITTEN and is_expanded(tensor):
            raise SharefoldError(f"model: {name} is expanded, which forbids changes: replace it by its .clone()")
    with ExitStack() as stack:
        stack.enter_context(random_kept(model))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device_of(model).type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(plain_defaults())
        yield


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Tensors that say nothing else are float32 and on the CPU inside."""
    kind = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.empty(0).device.type != "cpu":  # get_default_device() fails in torch 2.8 once the default was taken back
            stack.enter_context(torch.device("cpu"))
        if kind != torch.float32:
            stack.callback(torch.set_default_dtype, kind)
            torch.set_default_dtype(torch.float32)
        yield
