"""One bank for layers of different widths."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sharefold
from sharefold.calibration import ragged as module
from sharefold.calibration.problem import problem_of
from sharefold.calibration.ragged import can_share, problem_for
from sharefold.calibration.statistics import statistics_of
from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.layers import banks, form_of
from sharefold.methods import method_named
from sharefold.planner.candidates import find_units, together
from sharefold.plans import GroupPlan, Plan
from sharefold.solvers import shared_basis
from sharefold.store import quantize_

WIDTHS = (8, 12, 16, 20)
NAMES = tuple(f"stage1.{index}.conv" for index in range(len(WIDTHS)))
CALIBRATION = torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Grow(nn.Module):
    """A layer of DenseNet: its four new maps join what it was given."""

    def __init__(self, width: int, kernel: int = 3) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, 4, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Dense(nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.stage1 = nn.Sequential(*(Grow(width, kernel) for width in WIDTHS))
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage1(self.stem(x)).mean((2, 3)))


def dense(kernel: int = 3) -> Dense:
    torch.manual_seed(0)
    model = Dense(kernel).eval()
    # Common filters and a little of their own: what there is to be found.
    common = torch.randn(6, 20, kernel, kernel)
    for name, width in zip(NAMES, WIDTHS, strict=True):
        weight = model.get_submodule(name).weight
        mixed = torch.einsum("or,rihw->oihw", torch.randn(4, 6), common[:, :width])
        weight.data.copy_(0.1 * mixed + 0.01 * torch.randn_like(weight))  # type: ignore[operator,union-attr]
    model.head.weight.data.mul_(10)
    return model


def ragged_plan(rank: int) -> Plan:
    return Plan([GroupPlan("widths", "basis", NAMES, {"rank": rank})], 0, 0)


def test_errors_are_those_of_every_layer_by_itself() -> None:
    model = dense()
    graph = analyze(model, CALIBRATION[:1])
    statistics = statistics_of(model, graph, CALIBRATION)
    problem = problem_for(model, graph, NAMES, statistics)
    flat = problem.flat()
    assert flat.weights.shape == (4, 4, 20 * 9) and flat.kernel == (3, 3)
    found = shared_basis.solve(flat, 5)
    for k, (name, width) in enumerate(zip(NAMES, WIDTHS, strict=True)):
        alone = problem_of(model, graph, [name], statistics)
        expected = alone.errors(found.approximation[k : k + 1, :, : 9 * width])
        torch.testing.assert_close(found.errors[k : k + 1], expected, rtol=1e-3, atol=1e-6)


def test_one_bank_serves_all_widths(tmp_path: Path) -> None:
    model = dense()
    done = sharefold.convert_(model, ragged_plan(8), calibration=CALIBRATION)
    (bank,) = banks(model).values()
    assert tuple(bank.basis.shape) == (8, 20, 3, 3) and bank.uses == 4  # type: ignore[union-attr]
    assert done.plan.groups[0].error is not None and done.plan.groups[0].error < 0.05
    for name, width in zip(NAMES, WIDTHS, strict=True):
        layer = model.get_submodule(name)
        expected = torch.einsum("or,rihw->oihw", layer.coefficients, bank.basis[:, :width])  # type: ignore[arg-type,index]
        torch.testing.assert_close(layer.compose(), expected)  # type: ignore[operator]
    sharefold.save(model, tmp_path / "a.safetensors")
    again = sharefold.load(tmp_path / "a.safetensors", model=dense())
    with torch.no_grad():
        torch.testing.assert_close(again(CALIBRATION), model(CALIBRATION))
    rounded = copy.deepcopy(model)
    quantize_(rounded, "int8", calibration=CALIBRATION, original=done.original)
    with torch.no_grad():
        apart = (rounded(CALIBRATION) - model(CALIBRATION)).abs().max() / model(CALIBRATION).abs().max()
    assert 0 < float(apart) < 0.05


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_planner_puts_them_together(kernel: int) -> None:
    model = dense(kernel)
    graph = analyze(model, CALIBRATION[:1])
    units = together(model, find_units(graph, "stem"))
    assert [unit.members for unit in units] == [NAMES, ("head",)]
    budget = {1: "80%", 3: "60%"}[kernel]
    plan = sharefold.plan(model, budget=budget, calibration=CALIBRATION, method="basis", exclude="stem|head")
    (group,) = plan.groups
    assert set(group.members) <= set(NAMES) and len(group.members) > 1
    before = sum(p.numel() for p in model.parameters())
    done = sharefold.convert_(model, plan, calibration=CALIBRATION)
    after = sum(p.numel() for p in model.parameters())
    assert after == done.plan.params_after == plan.params_after <= float(budget[:-1]) / 100 * before


def test_sharing_competes_with_low_rank_alone() -> None:
    model = dense()
    options = {"budget": "40%", "calibration": CALIBRATION, "exclude": "stem|head", "objective": "error"}
    both = sharefold.plan(model, method=["basis", "svd"], **options)  # type: ignore[arg-type]
    assert [group.method for group in both.groups] == ["basis"]
    alone = sharefold.plan(model, method="svd", **options)  # type: ignore[arg-type]
    errors = [sum((g.error or 0) * len(g.members) for g in plan.groups) for plan in (both, alone)]
    assert errors[0] < 0.7 * errors[1]


def test_what_cannot_share_a_bank_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense()
    forms = [form_of(model.get_submodule(name)) for name in NAMES]
    assert can_share(forms)  # type: ignore[arg-type]
    grouped = form_of(nn.Conv2d(8, 8, 3, groups=2))
    assert not can_share([*forms, grouped]) and not can_share([*forms, form_of(nn.Conv2d(8, 8, 1))])  # type: ignore[list-item]
    monkeypatch.setattr(module, "LARGEST", 4 * (20 * 9) ** 2 - 1)
    assert not can_share(forms)  # type: ignore[arg-type]
    graph = analyze(model, CALIBRATION[:1])
    assert all(len(unit.members) == 1 for unit in together(model, find_units(graph)))


def test_other_methods_still_ask_for_equal_shapes() -> None:
    plan = Plan([GroupPlan("widths", "average", NAMES[:2], {})], 0, 0)
    with pytest.raises(SharefoldError, match="must be isomorphic"):
        sharefold.convert_(dense(), plan, calibration=CALIBRATION)
    assert method_named("basis").takes_ragged and not method_named("average").takes_ragged
