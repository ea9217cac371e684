"""Symbolic trace of a network that is never run in place of the network itself.

``torch.fx`` with the leaves that timm names. Two attempts: first only those of timm's leaves that hold no other
module, so that blocks such as NFNet's stay visible; then all of them. A trace counts only if, run on the example
input, it calls the same layers in the same order as the network and gives the same output.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from sharefold.graph.layers import BATCH_NORM_KEYS, is_layer_like
from sharefold.layers.surgery import DEPTH, LONGEST

# Modules that act on each channel alone but whose forward is hard to read from a graph.
CHANNELWISE_SOURCES = (
    "timm.layers.activations",
    "timm.layers.activations_me",
    "timm.layers.drop",
    "timm.layers.blur_pool",
    "timm.layers.pool2d_same",
)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


# The shape of a value that may hold tensors somewhere: nested ones, objects of any class.
UNKNOWN = "unknown"
_PLAIN = (
    bool, int, float, complex, str, bytes, type(None), slice, range, torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


class Tracer(fx.Tracer):
    """``fx.Tracer`` whose nodes know the module that created them (``node.meta["owner"]``, a qualified name), and who looks at
    their values from outside of the graph (``node.meta["seen"]``): a hook, or an attribute that the network leaves them in."""

    def __init__(self, *, deep: bool) -> None:
        functions = tuple(f for f in get_notrace_functions() if callable(f))
        super().__init__(autowrap_functions=functions, param_shapes_constant=True)
        self.opaque = tuple(get_notrace_modules())
        self.deep = deep
        self.owner = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_layer_like(m) or isinstance(m, _NORMS) or all(hasattr(m, key) for key in BATCH_NORM_KEYS):
            return True
        if type(m).__module__ in CHANNELWISE_SOURCES:
            return True
        if isinstance(m, self.opaque):
            return not (self.deep and any(True for _ in m.children()))
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        caller = self.owner
        self.owner = self.path_of_module(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self.owner = caller
        if m._forward_hooks or m._forward_pre_hooks:
            _mark((args, kwargs, result), f"seen by a hook of {self.path_of_module(m)}")
        return result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.owner
        return node


def trace(model: nn.Module, given: int, *, deep: bool) -> fx.Graph:
    """Traces ``model.forward`` with its first ``given`` arguments symbolic and the others at their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    fixed = {p.name: p.default for p in plain[given:] if p.default is not p.empty}
    graph = Tracer(deep=deep).trace(model, concrete_args=fixed or None)
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if key not in ("_modules", "_parameters", "_buffers"):
                _mark(value, f"kept as {name}.{key}" if name else f"kept as {key}")
    _drop_fixed_arguments(graph, given)
    return graph


def _mark(value: Any, by: str, depth: int = DEPTH) -> None:
    """Notes on the nodes of all symbolic values in ``value`` who sees them."""
    if isinstance(value, fx.Proxy):
        value.node.meta["seen"] = by
    elif depth and isinstance(value, dict | list | tuple) and len(value) <= LONGEST:
        for item in value.values() if isinstance(value, dict) else value:
            _mark(item, by, depth - 1)


def _drop_fixed_arguments(graph: fx.Graph, given: int) -> None:
    """Removes the placeholders of fixed arguments and the assertions that fx adds for them."""
    for extra in [node for node in graph.nodes if node.op == "placeholder"][given:]:
        stack = [extra]
        while stack:
            node = stack[-1]
            if node.users:
                stack.append(next(iter(node.users)))
            else:
                graph.erase_node(node)
                stack.pop()


class ShapeRecorder(fx.Interpreter):
    """Runs a graph with the model's own modules; leaves ``node.meta["shape"]`` on every node.

    The shape is a tuple of ints for a tensor, a list of such for a sequence of tensors, None for numbers, sizes and their like,
    and ``UNKNOWN`` for anything else.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=True, graph=graph)
        self.called: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["shape"] = _shape_of(value)
        if n.op == "call_module":
            self.called.append(str(n.target))
        return value


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return [tuple(v.shape) for v in value]
    return None if _is_plain(value) else UNKNOWN


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)


def tensors_in(value: Any) -> Iterable[Tensor]:
    """All tensors of a nested output, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def same_output(first: Any, second: Any) -> bool:
    """True when both hold the same tensors up to rounding; on the meta device only shapes can be compared."""
    a, b = list(tensors_in(first)), list(tensors_in(second))
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    for x, y in zip(a, b, strict=True):
        if x.is_meta or not x.is_floating_point():
            continue
        scale = float(y.abs().max()) if y.numel() else 0.0
        if math.isfinite(scale) and not torch.allclose(x, y, rtol=1e-3, atol=1e-4 * max(scale, 1e-12), equal_nan=True):
            return False
    return True
