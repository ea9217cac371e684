"""Planning and conversion whatever torch was told before, whatever the network does in its forward, and nothing of it changed."""

from __future__ import annotations

import copy
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import images
from networks import net as full_net
from repair_works import done_by, work_of
from torch import Tensor, nn
from torch.nn.parallel.replicate import replicate
from torch.utils.data import DataLoader, Dataset

import sharefold
from sharefold.bench import race_forms
from sharefold.errors import SharefoldError
from sharefold.finetune import finetune
from sharefold.graph import analyze
from sharefold.layers import repeat_blocks, shared_layers
from sharefold.measure import agreement, count_macs, evaluate, latency
from sharefold.plans import GroupPlan, Plan
from sharefold.repair import batchnorm_statistics
from sharefold.repair.batchnorm_statistics import NormStatistics
from sharefold.store import quantize_

IMAGES = images(40, 3)
net = functools.partial(full_net, blocks=2)
CONFIG = {"base": None}
QUICK = ("basis", "svd", "spatial")  # most of these tests are about what lies around a method


def converted(
    model: nn.Module, method: str | tuple[str, ...] = QUICK, given: Tensor = IMAGES, budget: str = "70%", **options: object
) -> tuple[Plan, nn.Module]:
    plan = sharefold.plan(model, budget=budget, calibration=given, method=method)
    sharefold.convert_(model, plan, calibration=given, config=CONFIG, **options)
    return plan, model


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    return nn.Sequential(*layers).eval()


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What torch was told -------------------------------------------------------------------------------------------------


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_type() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def undisturbed() -> tuple[Plan, nn.Module]:
    plan, model = converted(net(), "auto", refine=1)
    quantize_(model, "int6", calibration=IMAGES)
    return plan, model


@pytest.mark.parametrize(
    "told",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode, torch.no_grad, default_device, default_type,
    ],
    ids=["autocast", "inference", "no_grad", "device", "dtype"],
)  # fmt: skip
def test_settings_change_nothing(told: Callable, undisturbed: tuple[Plan, nn.Module], tmp_path: Path) -> None:
    plan, model = undisturbed
    other, template = net(), net()
    with told():
        again, _ = converted(other, "auto", refine=1)
        quantize_(other, "int6", calibration=IMAGES)
        sharefold.save(other, tmp_path / "net")
        read = sharefold.load(tmp_path / "net", model=template)
    assert again == plan and same_tensors(model, other) and same_tensors(model, read)
    other.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_images_made_in_inference_mode() -> None:
    with torch.inference_mode():
        made = IMAGES * 1
    assert same_tensors(converted(net(), given=made)[1], converted(net())[1])


def test_networks_that_cannot_be_converted_say_so_and_stay() -> None:
    with torch.inference_mode():
        made = net()
    old = net()
    nn.utils.weight_norm(old.stage1[0].conv1)
    cases = [(made, "inference_mode"), (torch.compile(net()), "_orig_mod"), (old, "old-style weight norm")]
    for model, words in cases:
        with pytest.raises(SharefoldError, match=words):
            converted(model, "average")
        assert not shared_layers(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("how", ["trace", "script", "compile"])
def test_programs_take_no_hooks(how: str, part: bool) -> None:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    made = {
        "trace": lambda: torch.jit.trace(stem, IMAGES[:1]), "script": lambda: torch.jit.script(stem),
        "compile": lambda: torch.compile(stem),
    }[how]()  # fmt: skip
    model = nn.Sequential(made, nn.Conv2d(8, 8, 3)).eval() if part else made
    words = f"model: {'its part 0' if part else 'it'} is {'compiled' if how == 'compile' else 'a TorchScript program'}: pass the"
    for verb in (sharefold.analyze, sharefold.calibrate):
        with pytest.raises(SharefoldError, match=words):
            verb(model, IMAGES[:1])


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_procedural_images_have_the_networks_type(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharefold.calibration.images.COUNT", 40)
    model = net().to(kind)
    cal = sharefold.calibrate(model)
    assert cal.images.dtype == kind
    sharefold.convert_(model, sharefold.plan(model, "70%", cal, method=QUICK), cal, config=CONFIG)
    assert shared_layers(model) and all(p.dtype == kind for p in model.parameters())


# What networks do ----------------------------------------------------------------------------------------------------


class WritesIntoItsInput(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = net(), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.sub_(0.5).div_(0.5) if self.in_place else (x - 0.5) / 0.5)


@pytest.mark.parametrize("refine", [None, 1])
def test_networks_that_write_into_their_input(refine: int | None) -> None:
    given = IMAGES.clone()
    plan, model = converted(WritesIntoItsInput(True), given=given, refine=refine)
    assert torch.equal(given, IMAGES)
    wanted, other = converted(WritesIntoItsInput(False), refine=refine)
    assert plan == wanted and same_tensors(model, other)
    assert analyze(WritesIntoItsInput(True), given[:1]).traced == "fx" and torch.equal(given, IMAGES)
    assert agreement(model, copy.deepcopy(model), given).kl == 0 and torch.equal(given, IMAGES)


class OwnStatistics(nn.Module):
    """Batch statistics in every mode, a counter, and noise that means nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        torch.rand(1), np.random.rand(), random.random()
        return self.net(nn.functional.batch_norm(x, self.mean, self.variance, training=True))


def test_planning_leaves_the_network_and_every_generator_as_they_were() -> None:
    model = OwnStatistics().eval()
    before, keys = copy.deepcopy(model.state_dict()), set(vars(model))

    def states() -> list[object]:
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]

    drawn = states()
    analyze(model, IMAGES[:2])
    cal = sharefold.calibrate(model, IMAGES)
    sharefold.plan(model, "70%", cal)
    sharefold.plan(model, "70%", IMAGES, method=QUICK)
    assert states() == drawn
    for network in (model, cal.original):
        assert set(vars(network)) == keys and all(torch.equal(before[name], t) for name, t in network.state_dict().items())


@pytest.mark.parametrize("draw", [torch.rand, np.random.rand, lambda count: random.random()], ids=["torch", "numpy", "python"])
def test_no_verb_leaves_a_generator_advanced_by_what_networks_draw(draw: Callable[[int], object]) -> None:
    model = small_net()
    model.register_forward_hook(lambda *_: [draw(1), None][1])
    states = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    def stays() -> bool:
        return (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()) == states

    x, plan = IMAGES[:24], Plan([GroupPlan("s", "svd", ("2",), {"rank": 4})], 0, 0)
    twin = copy.deepcopy(model)
    sharefold.convert_(model, plan, x, config=CONFIG)
    assert stays()
    sharefold.round_(model, "int6", x)
    assert stays()
    agreement(twin, model, x), count_macs(model, x), latency(model, x[:1], 1, 0), race_forms(model, twin, x[:1], 1)
    assert stays()
    evaluate(model, [(x, torch.zeros(len(x), dtype=torch.int64))])
    assert stays()


class NormTwice(nn.Module):
    """One norm behind two convolutions, or behind one and a sum."""

    def __init__(self, behind_both: bool) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(width, 8, 3, padding=1, bias=False) for width in (3, 8, 8))
        self.norm, self.fc, self.behind_both = nn.BatchNorm2d(8), nn.Linear(8, 5), behind_both

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(torch.relu(self.stem(x)))))
        x = self.norm(self.b(x)) if self.behind_both else self.norm(torch.relu(self.b(x)) + 1)
        return self.fc(torch.relu(x).mean((2, 3)))


@pytest.mark.parametrize("behind_both", [True, False])
def test_norms_used_twice_belong_to_no_layer(behind_both: bool) -> None:
    model = NormTwice(behind_both).eval()
    model.norm.running_mean.normal_(std=0.3)
    model.norm.running_var.uniform_(0.5, 2)
    assert {record.norm for record in analyze(model, IMAGES[:1]).layers.values()} == {None}
    dense = copy.deepcopy(model)
    cal = sharefold.calibrate(model, images(400, 3))
    plan = sharefold.plan(model, budget="80%", calibration=cal, objective="joint")
    done = sharefold.convert_(model, plan, calibration=cal, refine=2, config=CONFIG)
    # What it says of its report images is what the networks really do on others.
    assert done.kl == pytest.approx(agreement(dense, model, images(200, 9)).kl, rel=0.5, abs=1e-4)
    assert not any("forward" in vars(module) for module in (*model.modules(), *dense.modules()))


class UnderTwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.also = nn.ModuleList([self.net.stage2[0].conv2])

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("method", ["average", "basis", "svd"])
def test_a_layer_under_two_names_is_replaced_under_both(method: str, tmp_path: Path) -> None:
    plan, model = converted(UnderTwoNames(), method, budget="60%")
    assert model.net.stage2[0].conv2 in shared_layers(model).values()
    assert sum(p.numel() for p in model.parameters()) == plan.params_after
    assert model.also[0] is model.net.stage2[0].conv2
    sharefold.save(model, tmp_path / "net")
    read = sharefold.load(tmp_path / "net", model=UnderTwoNames())
    assert sum(p.numel() for p in read.parameters()) == plan.params_after and same_tensors(read, model)


class Tied(nn.Module):
    """The classifier's weight serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.second = net(), nn.Linear(16, 5)
        self.second.weight = self.net.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_tied_weights_stay_tied_in_loaded_networks(tmp_path: Path) -> None:
    base = Tied()
    _, model = converted(base)
    sharefold.save(model, tmp_path / "net")
    read = sharefold.load(tmp_path / "net", model=Tied())
    assert read.second.weight is read.net.fc.weight
    assert sum(p.numel() for p in read.parameters()) == sum(p.numel() for p in model.parameters())
    read.double()
    assert read.second.weight.data_ptr() == read.net.fc.weight.data_ptr()
    sharefold.save(read.float(), tmp_path / "again")
    sizes = {(tmp_path / name / "model.safetensors").stat().st_size for name in ("net", "again")}
    assert len(sizes) == 1


@pytest.mark.parametrize("method", ["average", "basis", "hybrid", "svd", "spatial"])
def test_frozen_parameters_stay_frozen(method: str) -> None:
    model = net()
    model.stage1.requires_grad_(False)
    model.stage2[0].conv1.weight.requires_grad_(False)
    _, shared = converted(model, method)
    for name, layer in shared_layers(shared).items():
        frozen = name.startswith("stage1") or name == "stage2.0.conv1"
        assert {p.requires_grad for p in layer.parameters()} <= {not frozen}, name
        if layer.bank is not None:
            assert {p.requires_grad for p in layer.bank.parameters()} == {not name.startswith("stage1")}, name
    assert shared.fc.weight.requires_grad


# What belongs to the caller ------------------------------------------------------------------------------------------


def test_a_calibration_stays_that_of_the_dense_network() -> None:
    """Layer reuse reorders channels of a copy; the next conversion must not see them."""
    def run(reused: bool) -> nn.Module:
        model = full_net(blocks=3)
        cal = sharefold.calibrate(model, IMAGES)
        if reused:
            first = copy.deepcopy(model)
            plan = sharefold.build_plan("layer-reuse", first, graph=cal.graph)
            done = sharefold.convert_(first, plan, cal, config=CONFIG)
            assert not same_tensors(done.original, model)
            assert same_tensors(cal.original, model) and cal.statistics.model is cal.original
        plan = sharefold.plan(model, "60%", cal, method="svd")
        sharefold.convert_(model, plan, cal, config=CONFIG)
        return model

    assert same_tensors(run(True), run(False))


class Stored(Dataset):
    """Hands out the batches that it keeps."""

    def __init__(self) -> None:
        labels = torch.arange(32) % 5
        self.batches = [(IMAGES[i : i + 8].clone(), labels[i : i + 8]) for i in range(0, 32, 8)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.batches[index]


@pytest.mark.parametrize("augment", [{"mixup": 0.4}, {"cutmix": 1.0}, {"random_erase": 0.9}], ids=lambda a: next(iter(a)))
def test_training_images_are_not_written_into(augment: dict[str, float]) -> None:
    data = Stored()
    before = [batch.clone() for batch, _ in data.batches]
    loader = DataLoader(data, batch_size=None)
    finetune(net(), loader, epochs=1, lr=1e-3, device="cpu", quiet=True, channels_last=False, ema=0, **augment)
    assert all(torch.equal(old, batch) for old, (batch, _) in zip(before, data.batches, strict=True))


def test_interrupted_reestimation_leaves_norms_that_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm_statistics, "MOST", 8)
    monkeypatch.setattr(batchnorm_statistics, "LEAST", 8)
    model, original = net(), net()
    before, calls = copy.deepcopy(model.state_dict()), []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    model.fc.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        done_by(NormStatistics(), work_of(original, model, IMAGES, IMAGES[:8], now=1.0))
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_rounding_that_fails_leaves_the_last_one() -> None:
    _, model = converted(net())
    quantize_(model, "int6", calibration=IMAGES)
    before, config, spec = copy.deepcopy(model), model.sharefold_config, copy.deepcopy(model.sharefold_store)
    with pytest.raises(SharefoldError, match="100 bytes"):
        quantize_(model, "mixed:100", calibration=IMAGES)
    assert same_tensors(model, before) and model.sharefold_config == config and model.sharefold_store == spec


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_packed_files_of_other_types(kind: torch.dtype, tmp_path: Path) -> None:
    """The network's type comes back, whatever the template's; values that no half can hold, too."""
    model = net().to(kind)
    model.bn.running_var[0] = 1e5
    _, model = converted(model, given=IMAGES.to(kind))
    quantize_(model, "int8", calibration=IMAGES.to(kind))
    sharefold.save(model, tmp_path / "net.safetensors")
    for template in (net(), net().to(kind)):
        wanted = kind
        read = sharefold.load(tmp_path / "net.safetensors", model=template).state_dict()
        for name, tensor in model.state_dict().items():
            assert read[name].dtype == (wanted if tensor.is_floating_point() else tensor.dtype), name
            assert torch.allclose(read[name].double(), tensor.double(), rtol=1e-2 if kind == torch.bfloat16 else 1e-6), name
            assert wanted != kind or torch.equal(read[name], tensor), name


def test_group_names_that_differ_in_dots_alone() -> None:
    model = net(blocks=2)
    groups = [
        GroupPlan("stage.1", "basis", ("stage1.0.conv1", "stage1.1.conv1"), {"rank": 3}),
        GroupPlan("stage_1", "basis", ("stage1.0.conv2", "stage1.1.conv2"), {"rank": 3}),
    ]
    with pytest.raises(SharefoldError, match="dots"):
        sharefold.convert_(model, Plan(groups, 0, 0), calibration=IMAGES, config=CONFIG)
    assert not shared_layers(model)


# Threads and replicas ------------------------------------------------------------------------------------------------


def repeat(model: nn.Module) -> None:
    for index, part in enumerate(repeat_blocks(list(model.stage1))):
        model.stage1[index] = part


def test_a_repeated_block_runs_in_several_threads() -> None:
    model = net(blocks=3)
    repeat(model)
    given = [images(2, seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [model(x) for x in given]
    wrong: list[float] = []

    def use(index: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                if not torch.equal(found := model(given[index]), wanted[index]):
                    wrong.append(float((found - wanted[index]).abs().max()))

    threads = [threading.Thread(target=use, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_several_threads_read_graphs_one_after_another() -> None:
    found: list[str] = []
    models = [net() for _ in range(6)]
    threads = [threading.Thread(target=lambda m=m: found.append(analyze(m, IMAGES[:1]).traced)) for m in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fx"] * 6


@pytest.mark.parametrize("kind", ["basis", "repeated"])
def test_data_parallel_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(blocks=3)
    if kind == "repeated":
        repeat(model)
    else:
        converted(model, "basis")
    place = sys.modules["torch.nn.parallel.replicate"]  # the package has a function of that name in its place
    monkeypatch.setattr(place, "_get_device_index", lambda device, *_: device)
    monkeypatch.setattr(place, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [list(tensors)] * 2)
    with pytest.raises(SharefoldError, match="DistributedDataParallel"):
        replicate(model, [0, 1], detach=True)
    assert replicate(net(), [0, 1], detach=True)
