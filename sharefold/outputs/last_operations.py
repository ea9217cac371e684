"""What the last operations of a traced network say about its outputs: softmax, sigmoid, normalise, argmax, a last layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from sharefold.outputs.leaves import walk

# Names of functions, methods and module classes, in lower case without underscores.
LAYOUT = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "contiguous", "clone",
    "float", "double", "half", "to", "typeas", "swapaxes", "identity", "dropout", "alpha", "detach", "pixelshuffle", "t",
}  # fmt: skip
SCALING = {"add", "sub", "mul", "div", "truediv", "rsub", "neg", "iadd", "imul", "isub", "itruediv", "pow"}
ACTIVATIONS = {
    "softmax": "softmax", "logsoftmax": "log_softmax", "sigmoid": "sigmoid", "hardsigmoid": "sigmoid", "logsigmoid": "relu",
    "tanh": "tanh", "hardtanh": "clamp", "relu": "relu", "relu6": "relu", "softplus": "relu", "elu": "relu", "leakyrelu": "relu",
    "silu": "relu", "gelu": "relu", "clamp": "clamp", "clip": "clamp", "normalize": "normalize", "argmax": "argmax",
}  # fmt: skip
POOLING = {
    "mean", "adaptiveavgpool1d", "adaptiveavgpool2d", "adaptiveavgpool3d", "avgpool1d", "avgpool2d", "avgpool3d", "amax",
    "adaptivemaxpool2d", "selectadaptivepool2d", "fastadaptiveavgpool",
}  # fmt: skip
RESIZING = {"interpolate", "upsample", "upsamplingbilinear2d", "resize"}
JOINING = {"cat", "concat", "concatenate"}


@dataclass
class Tail:
    """The last operations before an output.

    Attributes:
        layer: the layer behind all of them; "" where the way back ends elsewhere.
        linear: whether that is a Linear, of ``outputs`` features, rather than a convolution.
        activations: from the output backwards, among the values of ``ACTIVATIONS``.
        classes: the dim of a softmax, or of an argmax that reads the same values; as returned, None where unknown.
        pooled: whether values are means of a map.
        complete: whether nothing else can stand behind the layer.
        joined: the dim along which ``parts`` (their tails and sizes) are put together.
    """

    layer: str = ""
    linear: bool = False
    outputs: int = 0
    activations: list[str] = field(default_factory=list)
    classes: int | None = None
    pooled: bool = False
    complete: bool = True
    joined: int | None = None
    parts: list[tuple[Tail, int]] = field(default_factory=list)

    def ends_in(self, *names: str) -> bool:
        """Whether one of these is the last activation."""
        return bool(self.activations) and self.activations[0] in names


def tails_of(graph: fx.Graph, model: nn.Module) -> dict[str, Tail]:
    """The tail of every output, by the names that :func:`sharefold.outputs.leaves.tensors_of` gives them."""
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    return {name: tail_of(value, model) for name, value in walk(result) if isinstance(value, fx.Node)}


def tail_of(node: fx.Node, model: nn.Module) -> Tail:
    """Walks back from ``node`` over what only moves, scales, bounds or averages, to a layer or a concatenation."""
    tail = Tail()
    moved = False
    while True:
        for user in node.users:
            if tail.classes is None and not moved and _name(user, model) == "argmax":
                tail.classes = _dim(user)
        name = _name(node, model)
        module = _module(node, model)
        if name in ACTIVATIONS:
            tail.activations.append(ACTIVATIONS[name])
            if name in ("softmax", "logsoftmax") and not moved:
                tail.classes = getattr(module, "dim", None) if module is not None else _dim(node)
        elif name in POOLING:
            tail.pooled = True
        elif name in JOINING and not tail.activations:
            return _joined(node, model, tail, moved)
        elif _is_norm(node, model):
            tail.activations.append("normalize")
        elif isinstance(module, nn.Linear) or _has_kernel(module):
            tail.layer, tail.linear = str(node.target), isinstance(module, nn.Linear)
            tail.outputs = int(getattr(module, "out_features", 0) or getattr(module, "out_channels", 0))
            return tail
        elif name in LAYOUT:
            moved = True
        elif name in SCALING:
            if len(node.all_input_nodes) - sum(n.op == "get_attr" for n in node.all_input_nodes) != 1:
                return tail
        elif name not in RESIZING:
            return tail
        source = next((n for n in node.all_input_nodes if n.op != "get_attr"), None)
        if source is None:
            return tail
        node = source


def _joined(node: fx.Node, model: nn.Module, tail: Tail, moved: bool) -> Tail:
    """The tails of what a ``cat`` puts together, where the trace knows the sizes."""
    tensors = node.args[0] if node.args else node.kwargs.get("tensors", ())
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    if moved or not isinstance(dim, int) or not isinstance(tensors, (list, tuple)):
        return tail
    for one in tensors:
        shape = one.meta.get("shape") if isinstance(one, fx.Node) else None
        if not isinstance(one, fx.Node) or not isinstance(shape, tuple) or not -len(shape) <= dim < len(shape):
            return tail
        tail.parts.append((tail_of(one, model), shape[dim]))
    tail.joined = dim
    return tail


def _has_kernel(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)  # a method of layers with quantised weights
    return isinstance(weight, Tensor) and weight.ndim > 2


def _is_norm(node: fx.Node, model: nn.Module) -> bool:
    """Whether ``node`` divides something by its own norm."""
    if _name(node, model) not in ("div", "truediv") or len(node.all_input_nodes) != 2:
        return False
    top, bottom = node.all_input_nodes
    return _name(bottom, model) in ("norm", "linalgnorm", "linalgvectornorm", "vectornorm") and top in bottom.all_input_nodes


def _module(node: fx.Node, model: nn.Module) -> nn.Module | None:
    if node.op != "call_module":
        return None
    try:
        return model.get_submodule(str(node.target))
    except AttributeError:
        return None


def _name(node: fx.Node, model: nn.Module) -> str:
    module = _module(node, model)
    if module is not None:
        name = type(module).__name__
    elif node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = "getitem" if node.target is operator.getitem else getattr(node.target, "__name__", str(node.target))
    else:
        name = ""
    return name.lower().replace("_", "")


def _dim(node: fx.Node) -> int | None:
    found: Any = node.kwargs.get("dim", node.kwargs.get("axis", node.args[1] if len(node.args) > 1 else None))
    return found if isinstance(found, int) else None
