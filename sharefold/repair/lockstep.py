"""Runs two networks of the same graph side by side, layer after layer, over all calibration images in bounded memory.

Sequential repair needs, for every converted layer in turn, the input that the converted prefix gives and the output
that the original had. All images go through both networks from one place to the next; between them only the values that are
still needed are kept, at places where they are few (:mod:`sharefold.repair.boundary`). So no image is left out, whatever
their size, and a walk costs about one forward pass of each network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.inputs import Input, Inputs
from sharefold.inputs import elements as numbers
from sharefold.layers import ConvForm, resolve
from sharefold.repair.boundary import Shelf, Values, elements, shelf_for
from sharefold.repair.call_order import calls_together
from sharefold.repair.node_values import fetch, run_node, value_at
from sharefold.repair.rectifier import Rectifier, rectifier_behind
from sharefold.repair.samples import Collector, Samples
from sharefold.running import as_input, batch_within, device_of, evaluating, run_on

# Bytes that values between two layers may take.
MEMORY_BYTES = 4 << 30
# Elements of the largest map of a batch.
BATCH_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Wanted:
    """A layer to stop at.

    Attributes:
        form: of the student's layer.
        norm: behind it, or None.
        rectified: whether an addition or a ReLU behind it matters.
        rows: (O,) of the teacher's output channels those that the student's layer still has; None for all.
    """

    form: ConvForm
    norm: str | None = None
    rectified: bool = False
    rows: Tensor | None = None


@dataclass(frozen=True)
class Visited:
    """A layer of the converted network that the walk has come to.

    Attributes:
        original, model: the two networks.
        name, norm: of the layer, and of the norm behind it or None.
        samples: what it is given and should give.
        rectifier: the addition and the ReLU behind the layer; None where neither is, or it was not asked for.
        norm_stays: whether nothing may be written into the norm.
    """

    original: nn.Module
    model: nn.Module
    name: str
    norm: str | None
    samples: Samples
    rectifier: Rectifier | None = None
    norm_stays: bool = False

    @property
    def layer(self) -> nn.Module:
        """In the converted network, also inside of a repeated block."""
        return resolve(self.model, self.name)

    @property
    def owner(self) -> nn.Module | None:
        """What takes up a constant change of the layer's output."""
        return output_mean_owner(self.model, self.layer, None if self.norm_stays else self.norm)


Visit = Callable[[Visited], None]


@torch.no_grad()
def walk(
    graph: fx.Graph, teacher: nn.Module, student: nn.Module, images: Input, wanted: dict[str, Wanted], visit: Visit
) -> None:
    """Walks ``graph`` once; before the student runs a layer of ``wanted``, calls ``visit`` with what was seen of it.

    ``visit`` may change the student's layer and the norm behind it.

    Args:
        teacher, student: both on one device.
        images: (n, C, H, W), or several inputs.
    """
    with evaluating(teacher, student):
        _Walk(graph, teacher, student, images).run(wanted, visit)


class _Walk:
    def __init__(self, graph: fx.Graph, teacher: nn.Module, student: nn.Module, images: Input) -> None:
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.several = isinstance(images, Inputs)
        if self.several:
            self.nodes = calls_together(teacher, self.nodes, as_input(teacher, images[:1]))
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.teacher, self.student = teacher, student
        self.device = device_of(teacher)
        last: dict[fx.Node, int] = {}
        for node in (*self.nodes, *(node for node in graph.nodes if node.op == "output")):
            for used in node.all_input_nodes:
                last[used] = self.place.get(node, len(self.nodes))
        self.last = {node: last.get(node, self.place[node]) for node in self.nodes}
        sizes, largest = self._sizes(images[:1])
        self.live = [
            sum(sizes[n] for n in self.nodes[:index] if self.last[n] >= index) for index in range(len(self.nodes) + 1)
        ]
        self.first_different = self._first_different()
        self.given = sum(node.op == "placeholder" for node in self.nodes)
        self.batches = images.split(batch_within(BATCH_ELEMENTS, largest, 100))
        self.count = len(images)

    def run(self, wanted: dict[str, Wanted], visit: Visit) -> None:
        stops = [index for index, node in enumerate(self.nodes) if node.op == "call_module" and node.target in wanted]
        if stops:  # a visit may change the norm of a layer that is the original's still
            self.first_different = min(self.first_different, stops[0])
        shelf, start = None, 0
        previous = 0
        for nodes in self._groups(stops):
            stop = self.place[nodes[0]]
            cut = min(range(previous, stop + 1), key=lambda index: (self.live[index], -index))
            cut = cut if cut >= self.given else 0  # inputs are read from the batch itself
            made, _ = shelf_for(self.live[cut], self.count, MEMORY_BYTES)
            target = made() if made is not None and cut > 0 and cut > start else None
            name = str(nodes[0].target)
            found = self._collect(nodes, wanted[name], shelf, start, target, cut)
            if target is not None:
                shelf, start = target, cut
            previous = stop + len(nodes)
            samples, rectifier = found
            if samples is not None:
                visit(Visited(self.teacher, self.student, name, wanted[name].norm, samples, rectifier))

    def _groups(self, stops: list[int]) -> list[list[fx.Node]]:
        """The nodes at ``stops``, those together that call one layer on several inputs."""
        groups: list[list[fx.Node]] = []
        for stop in stops:
            node, before = self.nodes[stop], groups[-1] if groups else []
            beside = self.several and bool(before) and self.place[before[-1]] == stop - 1
            if beside and before[0].target == node.target and not set(before) & set(node.all_input_nodes):
                before.append(node)
            else:
                groups.append([node])
        return groups

    def _collect(
        self, nodes: list[fx.Node], want: Wanted, shelf: Shelf | None, start: int, target: Shelf | None, cut: int
    ) -> tuple[Samples | None, Rectifier | None]:
        """Runs all images from ``start`` to ``nodes``, puts the values at ``cut`` on ``target``, and samples the layer, whose
        calls on several inputs they are; most have one."""
        collector = Collector(want.form, self.count * len(nodes))
        behind = [rectifier_behind(node, self.teacher, want.norm) if want.rectified else None for node in nodes]
        kinds = {(one.addend is None, one.rectified) if one is not None else None for one in behind}
        rectifier = behind[0] if len(kinds) == 1 else None
        stop = self.place[nodes[0]]
        for index, (theirs, ours) in enumerate(self._starts(shelf, start)):
            at = start
            if target is not None:
                ours = self._advance(theirs, ours, at, cut)
                target.put(2 * index, self._needed(theirs, cut))
                target.put(2 * index + 1, self._needed(theirs if ours is None else ours, cut))
                if shelf is not None:
                    shelf.drop(2 * index)
                    shelf.drop(2 * index + 1)
                at = cut
            ours = self._advance(theirs, ours, at, stop)
            seen = []
            for node, at_end in zip(nodes, behind, strict=True):
                found = self._at(node, want, at_end if rectifier is not None else None, theirs, theirs if ours is None else ours)
                if rectifier is not None and rectifier.addend is not None and found[2] is None:
                    rectifier = None
                seen.append(found)
            again = False
            for inputs, outputs, addends in seen:
                if isinstance(inputs, Tensor) and isinstance(outputs, Tensor):
                    collector.add(inputs, outputs, None if rectifier is None else addends, len(self.batches[index]), again)
                    again = True
        return collector.samples(), rectifier

    def _at(
        self, node: fx.Node, want: Wanted, rectifier: Rectifier | None, theirs: Values, ours: Values
    ) -> tuple[Any, Any, tuple[Tensor, Tensor] | None]:
        """What the student's layer reads at ``node``, what the teacher's gives, and what both networks add behind it; None where
        nothing is, or it is not there yet."""
        inputs = fetch(node.args[0] if node.args else next(iter(node.kwargs.values())), ours)
        outputs = _kept(run_node(node, self.teacher, dict(theirs), None), want)
        if rectifier is None or rectifier.addend is None:
            return inputs, outputs, None
        wanted = _kept(value_at(rectifier.addend, self.teacher, dict(theirs)), want)
        given = value_at(rectifier.addend, self.student, ours)
        if wanted is None or given is None or given.shape != outputs.shape or wanted.shape != outputs.shape:
            return inputs, outputs, None
        return inputs, outputs, (given, wanted)

    def _starts(self, shelf: Shelf | None, start: int) -> Iterator[tuple[Values, Values | None]]:
        """The values of both networks for every batch; None for the student's where they are the teacher's still."""
        for index, batch in enumerate(self.batches):
            if shelf is None:
                yield {_IMAGES: as_input(self.teacher, batch)}, None
            else:
                theirs = shelf.get(2 * index)
                yield theirs, None if start <= self.first_different else shelf.get(2 * index + 1)

    def _advance(self, theirs: Values, ours: Values | None, start: int, stop: int) -> Values | None:
        """Runs the nodes from ``start`` up to ``stop`` in both networks, once in those that are the same in both."""
        for index in range(start, stop):
            node = self.nodes[index]
            if index >= self.first_different and ours is None:
                ours = {key: fx.node.map_aggregate(value, _copy) for key, value in theirs.items()}
            values = run_node(node, self.teacher, theirs, theirs.get(_IMAGES))
            if ours is not None:
                ours[node] = run_node(node, self.student, ours, ours.get(_IMAGES))
            theirs[node] = values
            for used in (*node.all_input_nodes, node):
                if self.last[used] <= index:
                    theirs.pop(used, None)
                    if ours is not None:
                        ours.pop(used, None)
        return ours

    def _needed(self, values: Values, cut: int) -> Values:
        return {node: value for node, value in values.items() if node is not _IMAGES and self.last[node] >= cut}

    def _first_different(self) -> int:
        """The first node whose module is not the same in both networks: before it one run serves both."""
        for index, node in enumerate(self.nodes):
            if node.op == "call_module":
                if not _same_module(resolve(self.teacher, str(node.target)), resolve(self.student, str(node.target))):
                    return index
            elif node.op == "get_attr":
                ours, theirs = resolve(self.student, str(node.target)), resolve(self.teacher, str(node.target))
                if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor) and torch.equal(ours, theirs)):
                    return index
        return len(self.nodes)

    def _sizes(self, image: Input) -> tuple[dict[fx.Node, int], int]:
        """Elements of every node's value for one image, and of the largest."""
        values: Values = {_IMAGES: image.to(self.device)}
        sizes = {}
        for index, node in enumerate(self.nodes):
            values[node] = run_node(node, self.teacher, values, values[_IMAGES])
            sizes[node] = elements(values[node])
            for used in (*node.all_input_nodes, node):
                if self.last[used] <= index:
                    values.pop(used, None)
        return sizes, max([numbers(image), *sizes.values()])


def _kept(outputs: Any, want: Wanted) -> Any:
    """Those channels of the teacher's outputs that the student's layer still has."""
    if want.rows is None or not isinstance(outputs, Tensor):
        return outputs
    axis = outputs.ndim - 1 if want.form.kind == "linear" else 1
    return outputs.index_select(axis, want.rows.to(outputs.device))


_IMAGES: Any = "images"  # key of the batch itself among the values


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _same_module(first: nn.Module, second: nn.Module) -> bool:
    if type(first) is not type(second):
        return False
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(map(_same_tensor, ours.values(), theirs.values()))


def _same_tensor(first: Any, second: Any) -> bool:
    """False of what is no tensor: extra state may not know how to be compared."""
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape and torch.equal(first, second)


def largest_map(model: nn.Module, image: Input) -> int:
    """Elements of the largest module output for one image; bounds what :func:`walk` keeps per image."""
    largest = numbers(image)
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
