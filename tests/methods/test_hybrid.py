"""hybrid: what it counts, pivots, layers of different widths, conv groups, whole own filters, stored and refitted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from networks import images, logits, net, stage2_problem

import sharefold
from sharefold.calibration.problem import GroupProblem
from sharefold.layers import Bank, BasisConv, HybridConv, banks, form_of, shared_layers
from sharefold.measure import agreement
from sharefold.methods import AUTO, METHODS
from sharefold.methods.hybrid import Hybrid, kind_of, own_inputs
from sharefold.plans import GroupPlan, Plan
from sharefold.store import quantize_

IMAGES = images(24)
HYBRID = METHODS["hybrid"]
assert isinstance(HYBRID, Hybrid)


@pytest.fixture(scope="module")
def residual() -> GroupProblem:
    return stage2_problem("residual", number=24)


def test_it_competes_by_default() -> None:
    assert "hybrid" in AUTO and HYBRID.takes_ragged


@pytest.mark.parametrize(("kind", "role"), [("residual", "conv"), ("convnext", "fc1"), ("grouped", "conv")])
def test_pivots_save_the_squares_and_change_nothing(kind: str, role: str) -> None:
    group = stage2_problem(kind, role, 24)
    forms, layers = group.forms, len(group.forms)
    full, pivoted = {"rank": 5, "own": 2}, {"rank": 5, "own": 2, "pivoted": True}
    assert HYBRID.cost(forms, full) - HYBRID.cost(forms, pivoted) == 25 + 4 * layers
    # The places of pivots are integers, which are priced but no parameters.
    for options in (full, pivoted):
        blank = HYBRID.blank(forms, options)
        tensors = [*blank.bank.values(), *(t for member in blank.members for t in member.values())]
        assert HYBRID.cost(forms, options) == sum(t.numel() for t in tensors if t.is_floating_point())
    assert HYBRID.amount(forms, 5, 2) == HYBRID.cost(forms, pivoted) + 5 + 2 * layers
    weights = []
    for options in (full, pivoted):
        solution = HYBRID.solve(group, options)
        bank = Bank(solution.bank, layers)
        members = [HYBRID.member(form, bank, own, {}) for form, own in zip(forms, solution.members, strict=True)]
        assert {type(layer) for layer in members} == {HybridConv if kind_of(forms[0]) == "columns" else BasisConv}
        weights.append(torch.stack([layer.weight for layer in members]).flatten(2))
        assert solution.errors is not None
        torch.testing.assert_close(solution.errors, group.errors(weights[-1].detach()), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_options_that_do_not_fit(residual: GroupProblem) -> None:
    forms = residual.forms
    most = HYBRID.largest(forms)
    assert most == {"rank": len(forms) * 16, "own": own_inputs(forms)[0]} == {"rank": 96, "own": 48}
    assert HYBRID.fits(forms, most)
    for wrong in ({"rank": 0, "own": 1}, {"rank": 1, "own": 0}, {"rank": 1, "own": most["own"] + 1}, {"rank": 1, "own": 1.5},
                  {"rank": 97, "own": 1}, {"rank": 1, "own": most["own"], "pivoted": True}):  # fmt: skip
        assert not HYBRID.fits(forms, wrong)


def test_candidates_without_pivots_hold_whole_factors(residual: GroupProblem) -> None:
    for candidate in HYBRID.without_pivots().candidates(residual):
        assert "pivoted" not in candidate.options and candidate.cost == HYBRID.cost(residual.forms, candidate.options)


class Widths(torch.nn.Module):
    """Three layers of growing width, as in a DenseNet."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.body = torch.nn.ModuleList(torch.nn.Conv2d(c, 4, kernel, padding=kernel // 2, bias=False) for c in (8, 12, 16))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(c) for c in (8, 12, 16))
        self.stem, self.fc = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.body, self.norms, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_bank_serves_all_widths_and_own_filters_are_as_wide_as_their_layer(kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Widths(kernel).eval()
    names = tuple(f"body.{i}" for i in range(3))
    options = {"rank": 5, "own": 2, "pivoted": True}
    group = GroupPlan("widths", "hybrid", names, options)
    done = sharefold.convert_(model, Plan([group], 0, 0), calibration=IMAGES, config={"base": None})
    error = done.plan.groups[0].error
    assert error is not None and error < 0.5
    for name, width in zip(names, (8, 12, 16), strict=True):
        layer = model.get_submodule(name)
        own = layer.vertical if kernel == 3 else layer.unique  # type: ignore[union-attr]
        assert own.shape == (2, width * kernel - 2)  # type: ignore[union-attr]
    forms = [form_of(layer) for layer in Widths(kernel).body]
    shared = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in done.original.parameters())
    assert shared == HYBRID.cost(forms, options) - sum(f.out_channels * f.features for f in forms)  # type: ignore[arg-type,union-attr]
    sharefold.save(model, tmp_path / "a.safetensors")
    torch.testing.assert_close(logits(sharefold.load(tmp_path / "a.safetensors", model=Widths(kernel))), logits(model))
    torch.testing.assert_close(logits(sharefold.expand(model)), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["fp16", "int4", "kmeans4", "mixed:step=0.01"])
@pytest.mark.parametrize("pivoted", [False, True])
def test_it_is_rounded_and_read_back(text: str, pivoted: bool, tmp_path: Path) -> None:
    model = net(blocks=2)
    names = tuple(f"stage2.{i}.conv{j}" for i in (0, 1) for j in (1, 2) if (i, j) != (0, 1))
    options = {"rank": 12, "own": 6, **({"pivoted": True} if pivoted else {})}
    done = sharefold.convert_(
        model, Plan([GroupPlan("g", "hybrid", names, options)], 0, 0), calibration=IMAGES, config={"base": None}
    )
    rough = copy.deepcopy(model)
    quantize_(rough, text, calibration=IMAGES, original=done.original)
    again = sharefold.load(sharefold.save(rough, tmp_path / "net.safetensors"), model=net(blocks=2, seed=3))
    assert torch.equal(again(IMAGES), rough.eval()(IMAGES))
    assert agreement(model, rough, IMAGES).kl < (0.2 if "4" in text else 0.02)


def test_refit_solves_own_filters_again_and_leaves_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharefold.repair.own_factors import has_own_factors

    names = ("stage2.0.conv2", "stage2.1.conv1", "stage2.1.conv2")
    plan = Plan([GroupPlan("g", "hybrid", names, {"rank": 4, "own": 2, "pivoted": True})], 0, 0)
    plain, refitted = net(blocks=2), net(blocks=2)
    sharefold.convert_(plain, plan, calibration=IMAGES, repair=False)
    done = sharefold.convert_(refitted, plan, calibration=IMAGES)
    assert has_own_factors(refitted.get_submodule(names[0]), plan.groups[0])
    assert done.steps["refit"]["kept"]
    assert torch.equal(banks(plain)["g"].basis, banks(refitted)["g"].basis)  # type: ignore[arg-type]
    assert not torch.equal(plain.get_submodule(names[2]).vertical, refitted.get_submodule(names[2]).vertical)  # type: ignore[arg-type]
    assert len(shared_layers(refitted)) == 3
