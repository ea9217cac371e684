"""The walk through two networks gives what hooks on whole runs give, in whatever memory, and runs little twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import images, net
from torch import Tensor, fx, nn

from sharefold.layers import form_of
from sharefold.layers.form import ConvForm
from sharefold.repair import lockstep
from sharefold.repair.boundary import Shelf
from sharefold.repair.lockstep import Visited, Wanted, walk
from sharefold.repair.samples import Collector, Samples

IMAGES = images(24, 3)
BATCH = 10
MEMORY = {"all": 10**9, "half": 250_000, "file": 50_000, "nothing": 1000}


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lockstep._Walk.__init__

    def made(self: Any, *args: Any) -> None:
        real(self, *args)
        self.batches = args[3].split(BATCH)

    monkeypatch.setattr(lockstep._Walk, "__init__", made)


def form(model: nn.Module, name: str) -> ConvForm:
    found = form_of(model.get_submodule(name))
    assert found is not None
    return found


@torch.no_grad()
def changed(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy whose layers ``names`` have other weights."""
    model = copy.deepcopy(model)
    for name in names:
        weight = model.get_parameter(f"{name}.weight")
        weight.add_(0.2 * weight.std() * torch.randn_like(weight))
    return model


@torch.no_grad()
def by_hooks(teacher: nn.Module, student: nn.Module, name: str, given: Tensor = IMAGES) -> Samples:
    """The samples of a layer from whole runs of both networks."""
    collector = Collector(form(teacher, name), len(given))
    seen: list[Tensor] = []

    def note_input(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], out: Tensor) -> None:
        seen.append(next(iter([*args, *kwargs.values()])).clone())

    handles = [student.get_submodule(name).register_forward_hook(note_input, with_kwargs=True)]
    handles.append(teacher.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(out.clone())))
    for batch in given.split(BATCH):
        student(batch.clone()), teacher(batch.clone())
        collector.add(*seen)
        seen.clear()
    for handle in handles:
        handle.remove()
    found = collector.samples()
    assert found is not None
    return found


def compared(teacher: nn.Module, student: nn.Module, names: list[str], memory: int = 10**9, exact: bool = True) -> list[str]:
    """Walks, compares what is seen of every layer with whole runs at that moment, then changes the layer; gives the visited."""
    visited: list[str] = []

    def visit(at: Visited) -> None:
        wanted = by_hooks(teacher, student, at.name)
        assert torch.equal(at.samples.image, wanted.image)
        assert at.layer is student.get_submodule(at.name)
        for found, right in ((at.samples.x, wanted.x), (at.samples.y, wanted.y)):
            if exact:
                assert torch.equal(found, right), at.name
            else:
                torch.testing.assert_close(found, right, rtol=0, atol=4e-3 * float(right.abs().max()))
        with torch.no_grad():
            at.layer.weight.mul_(1.1)
        visited.append(at.name)

    graph = fx.symbolic_trace(teacher).graph
    given = IMAGES.clone()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lockstep, "MEMORY_BYTES", memory)
        walk(graph, teacher, student, given, {name: Wanted(form(teacher, name)) for name in names}, visit)
    assert torch.equal(given, IMAGES)
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    return visited


RESIDUAL = [f"{stage}.{block}.conv{conv}" for stage in ("stage1", "stage2") for block in (0, 1, 2) for conv in (1, 2)]


@pytest.mark.parametrize("memory", MEMORY)
def test_in_any_memory_a_layer_is_seen_as_in_whole_runs(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Shelf | None] = []
    real = lockstep.shelf_for

    def watched(count: int, *args: int) -> tuple[Callable[[], Shelf] | None, int]:
        make, size = real(count, *args)
        if count:  # at the network's beginning there is nothing
            made.append(None if make is None else make())
        return make, size

    monkeypatch.setattr(lockstep, "shelf_for", watched)
    teacher = net()
    visited = compared(teacher, changed(teacher, RESIDUAL), RESIDUAL, MEMORY[memory], exact=memory in ("all", "nothing"))
    assert visited == RESIDUAL and len(made) == len(RESIDUAL) - 1
    kinds = {None if shelf is None else (shelf.half, shelf._map is not None) for shelf in made}
    expected = {"all": {(False, False)}, "half": {(True, False), (False, False)}, "file": {(True, True)}, "nothing": {None}}
    assert kinds == expected[memory]


class Widths(nn.Module):
    """In-place operations, an optional argument, nodes of several inputs, keyword arguments, a value that skips far ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1),
                                          nn.Conv2d(8, 4, 3, padding=1, stride=2))  # fmt: skip
        self.relu = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 1.5))
        self.fc = nn.Linear(7, 5)
        self.eval()

    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 2.0) -> Tensor:
        x.mul_(factor)
        first = self.one(x)
        y = self.relu(first)
        z = self.two(input=y)
        z += y
        y.add_(1.0)
        w = self.three(torch.cat([z, self.relu(y)], dim=1))
        w = torch.mul(w, self.scale).relu_()
        w = torch.cat([w, F.interpolate(input=x, size=w.shape[-2:])], 1)
        return self.fc(w.permute(0, 2, 3, 1)).mean((1, 2))


@pytest.mark.parametrize("memory", MEMORY)
def test_networks_that_write_into_their_values(memory: str) -> None:
    teacher = Widths()
    names = ["one", "two", "three", "fc"]
    exact = memory in ("all", "nothing")
    assert compared(teacher, changed(teacher, ["one", "three"]), names, MEMORY[memory] // 4, exact=exact) == names


def test_the_dense_prefix_runs_in_one_network_alone() -> None:
    teacher = net()
    names = [name for name in RESIDUAL if name.startswith("stage2")]
    student, calls = changed(teacher, names), []  # type: ignore[var-annotated]
    prefix = ("stem", "stage1.2.bn2", "down")
    for network in (teacher, student):
        for name in prefix + ("stage2.1.bn1",):
            network.get_submodule(name).register_forward_hook(lambda *_, key=(network is teacher, name): calls.append(key))
    graph = fx.symbolic_trace(teacher).graph
    seen: list[Visited] = []
    walk(graph, teacher, student, IMAGES, {name: Wanted(form(teacher, name)) for name in names}, seen.append)
    batches = len(IMAGES.split(BATCH))
    for name in prefix:
        assert calls.count((False, name)) == 0
        # One image tells all sizes; nothing is put away on the way to the first stop, all is on the way to the second.
        assert calls.count((True, name)) == 2 * batches + 1
    assert batches <= calls.count((False, "stage2.1.bn1")) <= 2 * batches
    assert len(seen) == len(names)


def test_a_visit_may_change_the_norm_of_a_layer_that_is_the_originals() -> None:
    teacher = net(blocks=2)
    student = copy.deepcopy(teacher)
    names = ["stage1.0.conv1", "stage1.1.conv1"]
    inputs: list[Tensor] = []

    def visit(at: Visited) -> None:
        inputs.append(at.samples.x)
        if at.name == names[0]:
            student.get_buffer("stage1.0.bn1.running_mean").add_(1.0)

    graph = fx.symbolic_trace(teacher).graph
    walk(graph, teacher, student, IMAGES, {name: Wanted(form(teacher, name)) for name in names}, visit)
    assert torch.equal(inputs[1], by_hooks(teacher, student, names[1]).x)
    assert not torch.equal(inputs[1], by_hooks(teacher, copy.deepcopy(teacher), names[1]).x)


def test_values_are_dropped_when_nothing_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = net()
    walkers: list[Any] = []
    most: list[int] = []
    real_init, real_run = lockstep._Walk.__init__, lockstep.run_node

    def made(self: Any, *args: Any) -> None:
        walkers.append(self)
        real_init(self, *args)

    def run(node: fx.Node, model: nn.Module, values: dict[Any, Any], batch: Tensor | None) -> Any:
        held = [other for other in values if isinstance(other, fx.Node)]
        assert all(walkers[0].last[other] >= walkers[0].place[node] for other in held)
        most.append(len(held))
        return real_run(node, model, values, batch)

    monkeypatch.setattr(lockstep._Walk, "__init__", made)
    monkeypatch.setattr(lockstep, "run_node", run)
    walk(fx.symbolic_trace(teacher).graph, teacher, changed(teacher, RESIDUAL), IMAGES,
         {name: Wanted(form(teacher, name)) for name in RESIDUAL}, lambda _: None)  # fmt: skip
    assert max(most) == 2  # a block's input and what its layers make of it


def test_what_is_not_finite_is_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = net(blocks=2)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.stage1[0].bn2.weight.fill_(float("nan"))
    names = ["stage1.0.conv1", "stage1.1.conv1"]
    seen: list[str] = []
    graph = fx.symbolic_trace(teacher).graph
    for memory in MEMORY.values():
        seen.clear()
        monkeypatch.setattr(lockstep, "MEMORY_BYTES", memory)
        walk(graph, teacher, student, IMAGES, {name: Wanted(form(teacher, name)) for name in names},
             lambda at: seen.append(at.name))  # fmt: skip
        assert seen == names[:1]


def test_modes_come_back_and_no_gradients_are_left() -> None:
    teacher, student = net(blocks=2).train(), net(blocks=2).train()
    statistics = copy.deepcopy(dict(student.named_buffers()))
    walk(fx.symbolic_trace(teacher).graph, teacher, student, IMAGES, {"stage1.0.conv1": Wanted(form(teacher, "stage1.0.conv1"))},
         lambda at: None)  # fmt: skip
    assert all(module.training for model in (teacher, student) for module in model.modules())
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in student.named_buffers())
