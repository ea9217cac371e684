"""Whatever ends a conversion early leaves the network as it was."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from file_tools import reseal
from networks import images, net
from safetensors.torch import load_file
from torch import Tensor, nn

import sharefold
from sharefold import convert as module
from sharefold.errors import SharefoldError
from sharefold.graph.attributes import Attributes
from sharefold.graph.preserved import preserved, restored_on_error
from sharefold.layers import Bank, add_bank, replace_module
from sharefold.plans import GroupPlan, Plan

IMAGES = images(30, 3)
CONFIG = {"base": None}
# One group with a bank, one layer with factors of its own, and classifier and norms for the repairs.
PLAN = Plan(
    [
        GroupPlan("g", "basis", ("stage1.0.conv1", "stage1.1.conv1"), {"rank": 6}),
        GroupPlan("s", "svd", ("stage2.0.conv1",), {"rank": 6}),
    ], 0, 0,
)  # fmt: skip


def inside(model: nn.Module) -> dict[str, Any]:
    """All that a user could find of a network: modules, attributes, hooks, modes and tensors, by identity and by value."""
    found: dict[str, Any] = {}
    for name, part in model.named_modules():
        attributes = {
            key: [*map(id, value.values())] if isinstance(value, dict) else value if isinstance(value, bool) else id(value)
            for key, value in vars(part).items()
        }
        found[name] = (id(part), type(part), part.training, attributes)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.detach().tolist())
    return found


def lived_in() -> nn.Module:
    """A network with everything that must come back: mixed modes, frozen tensors, hooks, notes of its owner."""
    model = net(blocks=2).train()
    model.stage1[0].bn1.eval()
    model.stage2.requires_grad_(False)
    model.stage1[1].register_forward_hook(lambda *_: None)
    model.stem.note = {"by": "its owner"}
    return model


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


STOPS = {
    "solving": lambda patch: patch.setattr(module, "solutions_of", stopped),
    "installing": lambda patch: patch.setattr(module, "_measured", stopped),
    "freezing": lambda patch: patch.setattr(module, "_freeze", stopped),
    "means": lambda patch: patch.setattr(module, "absorb_means", stopped),
    "describing": lambda patch: patch.setattr(module, "describe", stopped),
    "refit": lambda patch: patch.setattr("sharefold.repair.refit.Refit.run", stopped),
    "within the refit": lambda patch: patch.setattr("sharefold.repair.refit._visit", stopped),
    "norms": lambda patch: patch.setattr("sharefold.repair.batchnorm_statistics.run_on", stopped),
    "last layers": lambda patch: patch.setattr("sharefold.repair.last_layers._fit", stopped),
    "refining": lambda patch: patch.setattr("sharefold.repair.refine.random_views", stopped),
    "rounding": lambda patch: patch.setattr("sharefold.store.round_network.absorb_statistics", stopped),
    "comparing": lambda patch: patch.setattr(module, "reported", stopped),
}


@pytest.mark.parametrize("stop", list(STOPS))
@pytest.mark.parametrize("shelf", [False, True], ids=["no bank before", "a bank before"])
def test_an_interruption_anywhere_leaves_the_network_as_it_was(stop: str, shelf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lived_in()
    if shelf:
        add_bank(model, "mine", Bank({"weight": torch.ones(2, 2)}, uses=1))
        model.sharefold_config = {"of": "its owner"}
    before = inside(model)
    STOPS[stop](monkeypatch)
    plan = Plan(PLAN.groups, 0, 0, store="int6")
    with pytest.raises(KeyboardInterrupt):
        sharefold.convert_(model, plan, IMAGES, refine=1, config=CONFIG)
    assert inside(model) == before


def test_a_store_that_does_not_fit_leaves_the_dense_network() -> None:
    model = lived_in()
    before = inside(model)
    with pytest.raises(SharefoldError, match="300 bytes") as caught:
        sharefold.convert_(model, Plan(PLAN.groups, 0, 0, store="mixed:300B"), IMAGES, config=CONFIG)
    assert "\n" not in str(caught.value) and inside(model) == before
    assert not hasattr(model, "sharefold_config") and not hasattr(model, "sharefold_banks")


def test_after_a_failure_it_converts_as_if_nothing_had_been() -> None:
    failed, fresh = net(blocks=2), net(blocks=2)
    with pytest.raises(SharefoldError):
        sharefold.convert_(failed, Plan(PLAN.groups, 0, 0, store="mixed:300B"), IMAGES, config=CONFIG)
    done = [sharefold.convert_(model, PLAN, IMAGES, config=CONFIG) for model in (failed, fresh)]
    assert done[0].plan == done[1].plan
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in failed.state_dict().items())


def test_the_plan_of_a_recipe_that_reorders_channels_comes_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(blocks=3)
    before = inside(model)
    plan = sharefold.build_plan("layer-reuse", model, IMAGES[:1])
    assert plan.groups
    monkeypatch.setattr(module, "reported", stopped)
    with pytest.raises(KeyboardInterrupt):
        sharefold.convert_(model, plan, IMAGES, config=CONFIG)
    assert inside(model) == before


def damage(file: Path) -> None:
    tensors = load_file(file)
    tensors["fc.bias"][0] = torch.nan
    reseal(file, tensors)


REFUSALS: dict[str, tuple[str, dict[str, bool], Callable[[nn.Module, Path], object]]] = {
    "other classes": (r"'fc\.weight' is", {}, lambda m, _: setattr(m, "fc", nn.Linear(m.fc.in_features, 7))),
    "a damaged file": ("damaged: download", {}, lambda _, file: damage(file)),
    "half a file": ("is damaged", {}, lambda _, file: file.write_bytes(file.read_bytes()[:5000])),
    "no codes to keep": ("keep_codes", {"keep_codes": True}, lambda m, _: None),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_load_into_a_network_that_is_refused(what: str, tmp_path: Path) -> None:
    message, options, prepare = REFUSALS[what]
    converted, mine = net(blocks=2), lived_in()
    sharefold.convert_(converted, PLAN, IMAGES, config=CONFIG, repair=False)
    file = sharefold.save(converted, tmp_path / "net.safetensors", plain=True)
    prepare(mine, file)
    before = inside(mine)
    with pytest.raises(SharefoldError, match=message) as caught:
        sharefold.load(file, model=mine, **options)
    assert inside(mine) == before and "\n" not in str(caught.value)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a module": lambda m: replace_module(m, "stem", nn.Conv2d(3, 8, 1)),
    "a module inside of a container": lambda m: m.stage1.append(nn.Identity()),
    "an attribute": lambda m: setattr(m.stem, "note", 1),
    "a lost attribute": lambda m: delattr(m.stem, "note"),
    "a container": lambda m: m.stem.note.update(by="another"),
    "a forward": lambda m: setattr(m.stem, "forward", lambda x: x),
    "a hook": lambda m: m.fc.register_forward_hook(lambda *_: None),
    "a lost hook": lambda m: m.stage1[1]._forward_hooks.clear(),
    "a mode": lambda m: m.eval(),
    "a value": lambda m: m.stem.weight.data.zero_(),
    "a statistic": lambda m: m.bn.reset_running_stats(),
    "a flag": lambda m: m.requires_grad_(False),
    "another parameter": lambda m: setattr(m.fc, "bias", nn.Parameter(torch.zeros(5))),
    "another buffer": lambda m: m.bn.register_buffer("more", torch.zeros(2)),
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_was_changed_in_the_block_is_put_back(change: str, error: type[BaseException]) -> None:
    model = lived_in()
    before = inside(model)
    with pytest.raises(error), restored_on_error(model):
        CHANGES[change](model)
        assert inside(model) != before
        raise error
    assert inside(model) == before


def test_without_an_error_changes_stay() -> None:
    model = lived_in()
    with restored_on_error(model):
        model.stem.weight.data.zero_()
        model.note = 1
    assert not model.stem.weight.any() and model.note == 1


class Watching(nn.Module):
    """Keeps a running mean of what it sees, in every run, with gradients and without."""

    seen: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.full((1,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.seen.mul_(0.9).add_(0.1 * y.mean())
        return y


@pytest.mark.parametrize("objective", ["fisher", "joint"])
def test_what_a_network_writes_on_itself_while_it_is_converted_is_taken_back(objective: str) -> None:
    model, x = Watching(net(blocks=2)), images(24)
    plan = sharefold.plan(model, "60%", x, method="basis", objective=objective)
    sharefold.convert_(model, plan, x, refine=1)
    assert model.seen.item() == 0.5 and model.seen.grad_fn is None
    copy.deepcopy(model)


class Expanded(nn.Module):
    """Takes its means off, a number that stands for three, and scales its classes by another."""

    mean: Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1), 0.25).expand(3, 1, 1))
        self.scale = nn.Parameter(torch.ones(1).expand(5))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - self.mean) * self.scale


@pytest.mark.parametrize("refine", [None, 1])
def test_expanded_tensors_are_converted_around(refine: int | None, tmp_path: Path) -> None:
    model, x = Expanded(net(blocks=2)), images(24)
    mean, plan = model.mean, sharefold.plan(model, "60%", x, method="basis")
    sharefold.convert_(model, dataclasses.replace(plan, store="int6"), x, refine=refine)
    assert model.mean is mean and mean.stride(0) == 0 and mean.unique().tolist() == [0.25]
    loaded = sharefold.load(sharefold.save(model, tmp_path / "net"), model=Expanded(net(blocks=2)))
    assert torch.equal(loaded(x), model.eval()(x))


def test_a_layer_of_an_expanded_tensor_is_refused() -> None:
    model = net(blocks=2)
    model.bn.running_mean = torch.zeros(1).expand(len(model.bn.running_mean))
    with pytest.raises(SharefoldError, match=r"bn\.running_mean is expanded, which forbids changes: replace it by its \.clone"):
        sharefold.plan(model, "60%", images(24))


def test_tensors_of_every_kind_are_put_back() -> None:
    model, base = lived_in(), torch.zeros(2, 3)
    with torch.inference_mode():
        made = torch.zeros(3)
    kinds = {
        "expanded": base[:, :1].expand(2, 4), "overlapping": torch.arange(4.0).unfold(0, 2, 1), "view": base[1],
        "inference": made, "sparse": torch.eye(3).to_sparse(), "unknown": torch.tensor([torch.nan, 0.0]),
    }  # fmt: skip
    buffers = nn.Module()
    for name, tensor in kinds.items():
        buffers.register_buffer(name, tensor)
    model = nn.Sequential(buffers, model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt), restored_on_error(model):
        base.add_(1)
        kinds["overlapping"][0, 1] = 7
        kinds["sparse"].mul_(2)
        kinds["unknown"].zero_()
        with torch.inference_mode():
            made.add_(1)
        model.to("meta")
        raise KeyboardInterrupt
    after = model.state_dict()
    assert all(torch.equal(after[name].to_dense().nan_to_num(9), before[name].to_dense().nan_to_num(9)) for name in before)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places


class Stubborn(Tensor):
    """Takes no values from others."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_:
            raise RuntimeError("it is read-only")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_all_others_are_put_back_where_one_tensor_cannot_be() -> None:
    model = nn.ParameterList([torch.zeros(2).as_subclass(Stubborn), torch.zeros(2)])
    told = pytest.warns(sharefold.SharefoldWarning, match=r"a tensor \(2,\) could not be put back \(it is read-only\)")
    with told, pytest.raises(KeyboardInterrupt), restored_on_error(model):
        for parameter in model:
            parameter.data.add_(1)
        raise KeyboardInterrupt
    assert model[1].tolist() == [0, 0]


class Ledger(OrderedDict):
    """A dictionary that nobody may write to through its own methods."""

    def __setitem__(self, key: object, value: object) -> None:
        raise TypeError


class Noting(nn.Module):
    """Writes down in every kind of place that it has run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.tensor, self.shared = torch.zeros(2), torch.zeros(1).expand(2)
        self.array, self.objects = np.array([0.0, np.nan]), np.array([[], None], dtype=object)
        self.queue, self.counter, self.numbers = deque([1, 2], maxlen=2), Counter(a=1), defaultdict(list, {"a": [1]})
        self.nested, self.pair = {"deep": [{"er": [0]}]}, ([0], torch.zeros(1))
        self.ledger, self.names = Ledger(), {"one"}
        self.every = [*inner.parameters()]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.tensor += y.mean()
        self.shared[:1].add_(1)
        self.array += 1
        self.objects[1] = x
        self.queue.append(len(x))
        self.counter["a"] += 1
        self.numbers["b"].append(1)
        self.numbers["a"].append(2)
        self.nested["deep"][0]["er"][0] += 1
        self.pair[0].append(1)
        self.pair[1].add_(1)
        OrderedDict.__setitem__(self.ledger, "x", 1)
        self.names.add("two")
        return y

    def notes(self) -> dict[str, Any]:
        texts = {key: repr(value) for key, value in vars(self).items() if key != "every" and key not in vars(nn.Module())}
        return {"texts": texts, "ids": {key: id(value) for key, value in vars(self).items()}, "graph": self.tensor.grad_fn}


@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_network_notes_in_attributes_is_taken_back(gradients: bool) -> None:
    model = Noting(net()).eval()
    before = model.notes()
    with preserved(model), torch.set_grad_enabled(gradients):
        model(IMAGES[:2])
        assert len({key for key, text in model.notes()["texts"].items() if text != before["texts"][key]}) == 11
    assert model.notes() == before
    with pytest.raises(KeyboardInterrupt), restored_on_error(model):
        model(IMAGES[:2])
        raise KeyboardInterrupt
    assert model.notes() == before


def test_calibrating_and_planning_take_back_what_is_noted() -> None:
    model = Noting(net(blocks=2)).eval()
    before = model.notes()
    sharefold.plan(model, "60%", sharefold.calibrate(model, IMAGES), method="basis")
    assert model.notes() == before


def test_what_has_not_changed_is_not_written() -> None:
    model = Noting(net())
    versions = [t._version for t in (model.tensor, model.shared, *model.every)]
    standing = Attributes(model)
    assert not standing.put_back() and versions == [t._version for t in (model.tensor, model.shared, *model.every)]
    model.tensor[0] = torch.nan
    assert standing.put_back() and not standing.put_back() and model.tensor.tolist() == [0, 0]


def test_banks_are_in_the_mode_of_their_network() -> None:
    for training in (False, True):
        model = net(blocks=2).train(training)
        sharefold.convert_(model, sharefold.plan(model, "60%", images(24), method="basis"), images(24), repair=False)
        assert {module.training for module in model.modules()} == {training}
