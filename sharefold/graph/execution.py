"""One forward pass of the real network under hooks: order of calls, shapes, and which norm follows which layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph.layers import is_batch_norm
from sharefold.layers import ConvForm

Shape = tuple[int, ...]


@dataclass
class LayerRun:
    """How one layer ran: shapes of its first call, number of calls, what followed and what it read."""

    input_shape: Shape
    output_shape: Shape
    calls: int = 0
    norms: set[str] = field(default_factory=set)
    norm_calls: int = 0
    reads_input_of: set[str] = field(default_factory=set)
    by_name: bool = False  # its input is passed by name, where hooks do not see it


@dataclass
class ModuleRun:
    """How a module that is not a layer ran. ``start`` and ``end`` count layer calls, so nested runs compare."""

    start: int
    end: int = -1
    calls: int = 0
    input_shape: Shape | None = None
    output_shape: Shape | None = None  # None unless the output is one tensor


@dataclass
class Run:
    layers: dict[str, LayerRun]  # in the order of the first call
    modules: dict[str, ModuleRun]
    order: list[str]  # every layer call
    output: Any


def call(model: nn.Module, example: Any) -> Any:
    """``model(*tuple)``, ``model(**mapping)`` or ``model(value)``."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(example)


def run_with_hooks(model: nn.Module, example: Any, layers: Mapping[str, ConvForm]) -> Run:
    """Runs the network once.

    Raises:
        SharefoldError: the forward pass failed; the message quotes the cause.
    """
    run = Run({}, {}, [], None)
    active: list[tuple[str, Tensor | None]] = []
    latest: tuple[str, Tensor] | None = None

    def before(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        source = _first_tensor(args, kwargs)
        if name in layers:
            if source is not None:
                entry = run.layers.setdefault(name, LayerRun(tuple(source.shape), ()))
                entry.reads_input_of |= {outer for outer, tensor in active if tensor is source}
                entry.by_name |= not args
            return
        if latest is not None and source is latest[1] and is_batch_norm(module, layers[latest[0]].out_channels):
            run.layers[latest[0]].norms.add(name)
            run.layers[latest[0]].norm_calls += 1
        active.append((name, source))
        entry_ = run.modules.setdefault(name, ModuleRun(len(run.order)))
        if entry_.calls == 0 and source is not None:
            entry_.input_shape = tuple(source.shape)

    def after(name: str, args: tuple, output: Any) -> None:
        nonlocal latest
        if name in layers:
            if name in run.layers and isinstance(output, Tensor):
                entry = run.layers[name]
                entry.output_shape = entry.output_shape or tuple(output.shape)
                entry.calls += 1
                latest = (name, output)
                run.order.append(name)
            return
        active.pop()
        module_run = run.modules[name]
        module_run.calls += 1
        if module_run.calls == 1:
            module_run.end = len(run.order)
            module_run.output_shape = tuple(output.shape) if isinstance(output, Tensor) else None

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(_pre(before, name), with_kwargs=True))
        handles.append(module.register_forward_hook(_post(after, name)))
    try:
        run.output = call(model, example)
    except Exception as error:
        cause = str(error).strip().splitlines()
        line = cause[0] if cause else type(error).__name__
        raise SharefoldError(f"forward pass: {type(model).__name__} fails on the example input ({line}): "
                             "pass an input that the model accepts") from error  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    return run


def _pre(hook: Any, name: str) -> Any:
    return lambda module, args, kwargs: hook(name, module, args, kwargs)


def _post(hook: Any, name: str) -> Any:
    return lambda module, args, output: hook(name, args, output)


def _first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
