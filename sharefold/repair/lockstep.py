"""Runs two networks of the same graph side by side, node by node, over all calibration images at once.

Sequential repair needs, for every converted layer in turn, the input that the converted prefix gives and the output
that the original had. Walking both networks together costs one forward pass of each, whatever their depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.layers import resolve
from sharefold.measure import device_of, evaluating, run_on

# Activations of all images and both networks that may live at once; elements of a batch's largest map, times four.
MEMORY_BYTES = 2 << 30
BATCH_ELEMENTS = 1 << 26

Values = list[dict[fx.Node, Any]]  # of one network, a dictionary a batch


@dataclass(frozen=True)
class Place:
    """A layer that both networks have come to.

    Attributes:
        node: the layer's.
        inputs: the student's inputs to the layer, one tensor a batch.
        targets: the teacher's outputs of it.
        teachers, students: what both networks have computed so far and still need.
        teacher_model, student_model: the networks behind them.
    """

    node: fx.Node
    inputs: list[Tensor]
    targets: list[Tensor]
    teachers: Values
    students: Values
    teacher_model: nn.Module
    student_model: nn.Module

    def teacher(self, node: fx.Node) -> list[Tensor] | None:
        """The teacher's values of another node; None when it, or a layer with parameters before it, is still to come."""
        return _values(node, self.teacher_model, self.teachers)

    def student(self, node: fx.Node) -> list[Tensor] | None:
        """The student's values of another node; None likewise."""
        return _values(node, self.student_model, self.students)


Visit = Callable[[str, Place], None]


@dataclass(frozen=True)
class Visited:
    """A layer of the converted network that the walk has come to: ``name``, its ``norm`` or None, and the ``place``."""

    original: nn.Module
    model: nn.Module
    name: str
    norm: str | None
    place: Place

    @property
    def layer(self) -> nn.Module:
        """In the converted network, also inside of a repeated block."""
        return resolve(self.model, self.name)

    @property
    def owner(self) -> nn.Module | None:
        """What takes up a constant change of the layer's output."""
        return output_mean_owner(self.model, self.layer, self.norm)


def walk(
    graph: fx.Graph, teacher: nn.Module, student: nn.Module, batches: list[Tensor], visit: Visit, names: set[str]
) -> None:
    """Walks ``graph`` once; before the student runs a layer in ``names``, calls ``visit(name, place)``.

    ``visit`` may change the student's layer and the norm behind it. Both networks must be in eval mode and on one device,
    to which ``batches`` are moved. Values are dropped after their last use, so memory is a few activation maps of all
    images, for two networks.
    """
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in node.all_input_nodes:
            last[used] = node
    device = device_of(teacher)
    batches = [batch.to(device) for batch in batches]
    teachers: Values = [{} for _ in batches]
    students: Values = [{} for _ in batches]
    for node in graph.nodes:
        if node.op == "output":
            return
        for values, batch in zip(teachers, batches, strict=True):
            values[node] = _run(node, teacher, values, batch)
        if node.op == "call_module" and node.target in names:
            inputs = [_fetch(node.args[0] if node.args else next(iter(node.kwargs.values())), v) for v in students]
            targets = [values[node] for values in teachers]
            visit(str(node.target), Place(node, inputs, targets, teachers, students, teacher, student))
        for values, batch in zip(students, batches, strict=True):
            values[node] = _run(node, student, values, batch)
        for used in [n for n in node.all_input_nodes if last[n] is node] + ([] if node.users else [node]):
            for values in (*teachers, *students):
                values.pop(used, None)


def _fetch(argument: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(argument, lambda n: values[n])


def _values(node: fx.Node, model: nn.Module, batches: Values) -> list[Tensor] | None:
    """What the node has given, or gives now that its inputs are there: a shortcut often comes after the layers it skips."""
    steps = _ahead(node, model, batches[0]) if batches else None
    if steps is None or not _harmless(steps, model, batches[0]):
        return None
    return [_computed(steps, model, dict(values))[node] for values in batches]


def _ahead(node: fx.Node, model: nn.Module, values: dict[fx.Node, Any]) -> list[fx.Node] | None:
    """What must run to give ``node``'s value, in order; None if something of it must wait for its turn."""
    steps: dict[fx.Node, None] = {}

    def possible(node: fx.Node) -> bool:
        if node in values or node in steps:
            return True
        if node.op not in ("call_module", "call_function", "call_method"):
            return False
        if node.op == "call_module" and any(True for _ in resolve(model, str(node.target)).parameters()):
            return False  # may be a layer that is not repaired yet
        if not all(possible(used) for used in node.all_input_nodes):
            return False
        steps[node] = None
        return True

    return list(steps) if possible(node) else None


def _harmless(steps: list[fx.Node], model: nn.Module, values: dict[fx.Node, Any]) -> bool:
    """Whether the steps leave their inputs as they are: in place, they would do their work twice."""
    tensors: list[Tensor] = []

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors.append(leaf.clone())
        return tensors[-1]

    used = {node for step in steps for node in step.all_input_nodes if node in values}
    copies = {node: fx.node.map_aggregate(values[node], copied) for node in used}
    versions = [tensor._version for tensor in tensors]
    _computed(steps, model, copies)
    return versions == [tensor._version for tensor in tensors]


def _computed(steps: list[fx.Node], model: nn.Module, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """``values``, and those of the steps."""
    for step in steps:
        values[step] = _run(step, model, values, torch.empty(0))
    return values


def _run(node: fx.Node, model: nn.Module, values: dict[fx.Node, Any], batch: Tensor) -> Any:
    if node.op == "placeholder":
        # A traced forward may have optional arguments; only the first placeholder is the image batch.
        return batch.clone() if not values else (node.args[0] if node.args else None)
    args, kwargs = _fetch(node.args, values), _fetch(node.kwargs, values)
    if node.op == "get_attr":
        return resolve(model, str(node.target))
    if node.op == "call_module":
        return resolve(model, str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def batches_for(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Of ``images``, as many as two networks' activations fit into memory for, in batches."""
    size = largest_map(model, images[:1])
    images = images[: max(8, MEMORY_BYTES // (4 * 8 * size))]
    return list(images.split(max(1, BATCH_ELEMENTS // (4 * size))))


def largest_map(model: nn.Module, image: Tensor) -> int:
    """Elements of the largest module output for one image; bounds what :func:`walk` keeps per image."""
    largest = image.numel()
    handles = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel())

    for module in model.modules():
        handles.append(module.register_forward_hook(note))
    try:
        with evaluating(model):
            run_on(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return largest
