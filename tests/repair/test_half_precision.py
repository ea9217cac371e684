"""Refinement in bfloat16: taken where the processor has it and it says the same, left alone everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Small, same, state
from repair_works import calibration_on
from torch import Tensor, nn

from sharefold.layers.norm_fusion import norms_fused
from sharefold.repair import half_precision
from sharefold.repair.guard import Guard
from sharefold.repair.half_precision import depthwise_in_full, native, take_bfloat16
from sharefold.repair.refine import refine
from sharefold.repair.refine_loss import lessons

IMAGES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def damaged(teacher: nn.Module) -> nn.Module:
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv" in name:
                parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.fixture
def anywhere(monkeypatch) -> None:
    """As if every processor had bfloat16; those that do not still compute in it, slowly."""
    monkeypatch.setattr(half_precision, "native", lambda device: True)


class Refusing(nn.Module):
    """Something that is not made for bfloat16."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            raise self.error("not implemented for 'BFloat16'")
        return x


class Keeping(nn.Module):
    """A network that keeps a tensor of the type that it met first, one for each size of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.kept:
            self.kept[len(x)] = torch.ones(1).to(x)
        return x * self.kept[len(x)]


def test_taken_where_the_processor_has_it(anywhere) -> None:
    teacher = Small().eval()
    model = damaged(teacher)
    cal = calibration_on(teacher, IMAGES, IMAGES)
    with lessons(cal, model, IMAGES, ("layer1.0", "layer1.1"), ()) as taught:
        exact = float(taught.loss(IMAGES).detach())
        assert take_bfloat16(taught, IMAGES) and taught.dtype == torch.bfloat16
        loss = taught.loss(IMAGES)
        assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(exact, rel=half_precision.NOISE)
        assert float(loss.detach()) != exact, "nothing was rounded"
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())


def test_refines_as_in_full_precision(anywhere, monkeypatch) -> None:
    teacher = Small().eval()
    cal = calibration_on(teacher, IMAGES, IMAGES)
    found = {}
    for kind in ("halves", "full"):
        if kind == "full":
            monkeypatch.setattr(half_precision, "native", lambda device: False)
        model = damaged(teacher)
        found[kind] = refine(model, cal, guard=Guard(cal.comparison(IMAGES)), epochs=8, batch_size=8)
        assert found[kind].kept and {p.dtype for p in model.parameters()} == {torch.float32}
    assert found["halves"].kl_before == found["full"].kl_before, "what judges is in full precision"
    gained = {kind: record.kl_before - record.kl_after for kind, record in found.items()}
    assert gained["full"] > 0.3 * found["full"].kl_before
    assert gained["halves"] == pytest.approx(gained["full"], rel=0.15)


def test_left_alone_where_its_noise_is_what_there_is_to_learn(anywhere) -> None:
    teacher = Small().eval()
    model = copy.deepcopy(teacher)
    with torch.no_grad():
        model.head.weight.mul_(1.0005)
    cal = calibration_on(teacher, IMAGES, IMAGES)
    with lessons(cal, model, IMAGES, ("layer1.0",), ()) as taught:
        assert not take_bfloat16(taught, IMAGES) and taught.dtype is None


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, KeyError])
def test_left_alone_where_an_operation_is_not_made_for_it(anywhere, error) -> None:
    teacher = Small().eval()
    teacher.layer1.append(Refusing(error))
    model = damaged(teacher)
    cal = calibration_on(teacher, IMAGES, IMAGES)
    record = refine(model, cal, guard=Guard(cal.comparison(IMAGES)), epochs=4, batch_size=16)
    assert record.kept


def test_left_alone_where_a_network_keeps_something(anywhere) -> None:
    teacher = Small().eval()
    teacher.layer1.append(Keeping())
    model = damaged(teacher)
    cal = calibration_on(teacher, IMAGES, IMAGES)
    record = refine(model, cal, guard=Guard(cal.comparison(IMAGES)), epochs=4, batch_size=24)
    assert record.kept
    for network in (model, cal.original):
        kept = network.layer1[-1].kept
        assert len(kept) >= 2 and {tensor.dtype for tensor in kept.values()} == {torch.float32}


def test_left_alone_with_a_criterion_and_in_other_types(anywhere) -> None:
    teacher = Small().eval()
    cal = calibration_on(teacher, IMAGES, IMAGES)
    with lessons(cal, damaged(teacher), IMAGES, (), ()) as taught:
        taught.criterion = lambda ours, theirs: (ours - theirs).square().flatten(1).sum(1)
        assert not take_bfloat16(taught, IMAGES)
    double = copy.deepcopy(teacher).double()
    cal = calibration_on(double, IMAGES.double(), IMAGES.double())
    with lessons(cal, damaged(double), IMAGES.double(), (), ()) as taught:
        assert not take_bfloat16(taught, IMAGES.double())


def test_not_native_where_torch_does_not_say_so(monkeypatch) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert not native(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert native(torch.device("cpu")) and not native(torch.device("meta"))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.deep, self.norm = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.wide(x)
        self.deeper = self.norm(self.deep(self.seen))
        return self.deeper


def test_depthwise_layers_take_what_they_are_given() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4)
    x = torch.randn(2, 4, 5, 5)
    with depthwise_in_full(layer), torch.autocast("cpu", torch.bfloat16):
        wanted = layer(x, output_size=(12, 12))
        found = layer(input=x.bfloat16(), output_size=(12, 12))
    assert found.shape == (2, 4, 12, 12) and found.dtype == wanted.dtype == torch.float32
    assert torch.allclose(found, wanted, atol=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_depthwise_layers_stay_in_full_precision(fused) -> None:
    model, x = Depthwise().eval(), torch.randn(2, 4, 9, 9)
    before = state(model)
    with norms_fused(model, {"deep": "norm"} if fused else {}), depthwise_in_full(model):
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
            assert model.seen.dtype == torch.bfloat16 and found.dtype == torch.float32
        wanted = model.norm(model.deep(model.seen.float()))
        assert torch.equal(found, wanted) and not torch.equal(found, plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert not any("forward" in module.__dict__ for module in model.modules()) and same(state(model), before)
