"""What is behind a layer and its norm: an addition, a ReLU, or both."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from torch import fx, nn

from sharefold.graph.ops import ADDITIONS, op_name
from sharefold.layers import resolve


@dataclass(frozen=True)
class Rectifier:
    """A ReLU behind a layer, an addition, or one behind the other.

    Attributes:
        addend: what is added to the layer's output, a shortcut for example; None where nothing is.
        rectified: whether a ReLU comes next.
    """

    addend: fx.Node | None = None
    rectified: bool = True


def rectifier_behind(node: fx.Node, model: nn.Module, norm: str | None) -> Rectifier | None:
    """The addition and the ReLU behind the layer at ``node``; None where neither is, or something stands in between.

    Args:
        model: the network whose modules are asked.
        norm: name of the norm that belongs to the layer.
    """
    last = node
    if norm is not None:
        found, behind = resolve(model, norm), _behind(last, model)
        activation = getattr(found, "act", nn.Identity())  # of timm's BatchNormAct2d
        if behind is None or behind.target != norm or getattr(found, "running_var", None) is None:
            return None
        last = behind
        if not isinstance(activation, nn.Identity):
            return Rectifier() if isinstance(activation, nn.ReLU | nn.ReLU6) else None
    behind = _behind(last, model)
    if behind is not None and _is_relu(behind, model):
        return Rectifier()
    if behind is None or not _calls(behind, ADDITIONS) or len(behind.all_input_nodes) != 2 or "alpha" in behind.kwargs:
        return None
    after, others = _behind(behind, model), [n for n in behind.all_input_nodes if not _leads_to(last, n, model)]
    return Rectifier(others[0], after is not None and _is_relu(after, model)) if len(others) == 1 else None


def _behind(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The one node that uses this one's value, whatever does nothing in eval mode left out; None if there are several."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if not _idle(node, model):
            return node
    return None


def _leads_to(node: fx.Node, other: fx.Node, model: nn.Module) -> bool:
    """Whether ``other`` is ``node``, or is it with nothing but idle modules between."""
    while other is not node and _idle(other, model):
        other = other.all_input_nodes[0]
    return other is node


def _idle(node: fx.Node, model: nn.Module) -> bool:
    idle = nn.Identity | nn.Dropout | nn.Dropout2d
    return node.op == "call_module" and isinstance(resolve(model, str(node.target)), idle)


def _is_relu(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(resolve(model, str(node.target)), nn.ReLU | nn.ReLU6)
    return _calls(node, {"relu", "relu6"})


def _calls(node: fx.Node, names: Container[str]) -> bool:
    return node.op in ("call_function", "call_method") and op_name(node) in names
