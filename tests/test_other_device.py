"""Everything that runs on a GPU, on a device that this machine has: same results as on the CPU, images given on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from networks import images, net
from other_device import Elsewhere, other_device
from torch import nn

import sharefold
from sharefold.convert import Conversion
from sharefold.measure import agreement
from sharefold.planner.objectives import OBJECTIVES
from sharefold.plans import GroupPlan, Plan

IMAGES, NEW = images(30, 3), images(100, 9)
PLAN = Plan(
    [
        GroupPlan("a", "basis", ("stage1.0.conv1", "stage1.1.conv1"), {"rank": 6}),
        GroupPlan("b", "spatial", ("stage2.0.conv1",), {"rank": 12, "pivoted": True}),
        GroupPlan("c", "hybrid", ("stage2.0.conv2", "stage2.1.conv2"), {"rank": 6, "own": 3, "pivoted": True}),
    ],
    0, 0,
)  # fmt: skip


def compared(kind: str, run: Callable[[nn.Module], Conversion]) -> None:
    """``run`` elsewhere gives about what it gives on the CPU: sums are not added up in the same order everywhere."""
    here, there = net(kind, blocks=2), net(kind, blocks=2)
    done = run(here)
    with other_device() as device:
        there.to(device)
        again = run(there)
        assert all(isinstance(tensor, Elsewhere) for tensor in there.state_dict().values())
        assert agreement(sharefold.expand(there), there, IMAGES).kl < 1e-4
        wanted = agreement(again.original, there, NEW).kl
    assert again.steps.keys() == done.steps.keys()
    assert agreement(done.original, here, NEW).kl == pytest.approx(wanted, rel=0.5, abs=1e-3)


def test_the_device_refuses_tensors_of_the_cpu() -> None:
    model = net()
    with other_device() as device:
        model.to(device)
        with pytest.raises(RuntimeError, match="same device"):
            model(IMAGES)
        assert model(IMAGES.to(device)).device == device


@pytest.mark.parametrize(
    ("kind", "method"),
    [("residual", "fold"), ("grouped", "basis"), ("depthwise", "fold"), ("convnext", "svd"),
     ("std", "spatial"), ("residual", "hybrid")],
)  # fmt: skip
def test_planning_repairs_and_refinement(kind: str, method: str) -> None:
    def run(model: nn.Module) -> Conversion:
        plan = sharefold.plan(model, budget="70%", calibration=IMAGES, method=method, exclude="^stage1")
        assert plan.groups
        return sharefold.convert_(model, plan, calibration=IMAGES, refine=1, config={"base": None})

    compared(kind, run)


@pytest.mark.parametrize("method", ["average", "tied", "tucker", "cluster-layer", "cluster-filter", "cluster-kernel"])
def test_methods_that_auto_does_not_try(method: str) -> None:
    def run(model: nn.Module) -> Conversion:
        plan = sharefold.plan(model, budget="80%", calibration=IMAGES, method=method, exclude="^stage1")
        return sharefold.convert_(model, plan, calibration=IMAGES, repair=False, config={"base": None})

    compared("residual", run)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "fisher"])
def test_every_objective(objective: str) -> None:
    def run(model: nn.Module) -> Conversion:
        plan = sharefold.plan(model, budget="60%", calibration=IMAGES, objective=objective, method=("basis", "svd"))
        return sharefold.convert_(model, plan, calibration=IMAGES, repair=False, config={"base": None})

    compared("residual", run)


@pytest.mark.parametrize("store", ["int4", "kmeans3", "mixed:step=0.01"])
def test_every_store(store: str) -> None:
    def run(model: nn.Module) -> Conversion:
        return sharefold.convert_(model, replace(PLAN, store=store), calibration=IMAGES, repair=False, config={"base": None})

    compared("residual", run)


def test_images_made_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharefold.calibration.images.COUNT", 60)

    def run(model: nn.Module) -> Conversion:
        return sharefold.convert_(model, PLAN, config={"base": None})

    compared("residual", run)


def test_budgets_in_bytes() -> None:
    def run(model: nn.Module) -> Conversion:
        plan = sharefold.plan(model, budget="12kB", calibration=IMAGES, method="basis")
        return sharefold.convert_(model, plan, calibration=IMAGES, repair=False, config={"base": None})

    compared("residual", run)
