"""Pivoted factors while they are trained: the same network, whole and orthonormal, and pivoted again whatever happens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from networks import images, logits, made_once, net
from torch import nn

import sharefold
from sharefold.finetune.loop import finetune
from sharefold.finetune.losses import collect_bases
from sharefold.finetune.whole import whole_factors
from sharefold.format import carry_config, config_of
from sharefold.layers import banks, shared_layers
from sharefold.methods import method_named

METHODS = ("basis", "hybrid", "svd", "spatial")


@made_once
def converted(method: str) -> nn.Module:
    model = net("residual")
    plan = sharefold.plan(model, budget="60%", method=method, calibration=images(16))
    assert plan.groups and all(method_named(g.method).name == method and g.options["pivoted"] for g in plan.groups)
    sharefold.convert_(model, plan, calibration=images(16), repair=False)
    return model


def factors(model: nn.Module) -> Iterator[torch.Tensor]:
    for owner in (*banks(model).values(), *shared_layers(model).values()):
        for name in ("basis", "unique", "vertical"):
            if isinstance(tensor := getattr(owner, name, None), nn.Parameter):
                yield tensor


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_network_stays_and_its_factors_are_orthonormal(method: str) -> None:
    model = converted(method)
    before, wanted, size = logits(model), shapes(model), sum(p.numel() for p in model.parameters())
    with whole_factors(model):
        found = list(factors(model))
        assert found and sum(p.numel() for p in model.parameters()) > size
        for factor in found:
            rows = factor.detach().flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
        assert len(collect_bases(model)) == len(banks(model))
        with torch.no_grad():
            for factor in found:
                factor.add_(0.05 * torch.randn_like(factor))
        moved = logits(model)
        assert not torch.allclose(moved, before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits(model), moved, rtol=1e-4, atol=1e-4)
    assert shapes(model) == wanted and collect_bases(model) == []


@pytest.mark.parametrize("method", METHODS)
def test_filters_that_came_to_depend_on_each_other_are_pivoted(method: str) -> None:
    model = converted(method)
    with whole_factors(model), torch.no_grad():
        for factor in factors(model):
            factor[0] = 0
            factor[-1] = factor[0]
        moved = logits(model)
    torch.testing.assert_close(logits(model), moved, rtol=1e-4, atol=1e-4)


def test_errors_pass_and_leave_pivoted_factors() -> None:
    model = converted("basis")
    wanted = shapes(model)
    with pytest.raises(KeyError), whole_factors(model):
        raise KeyError
    with pytest.raises(KeyError), whole_factors(model), torch.no_grad():
        next(factors(model)).fill_(float("nan"))
        raise KeyError
    assert shapes(model) == wanted


def test_a_trained_network_is_saved_as_small_as_it_came(tmp_path) -> None:
    model = converted("basis")
    size, start = sum(p.numel() for p in model.parameters()), copy.deepcopy(model)
    x, y = images(16), torch.arange(16) % 5
    told = {"agreement": 0.99, "report_images": 150, "kl": 0.01, "outputs": [], "top1": 0.1, "params": size}
    carry_config(model, dataclasses.replace(config_of(model), metrics=told))
    report = finetune(
        model, (x, y), (x, y), out=tmp_path / "net", epochs=2, batch_size=8, device="cpu", quiet=True, optimizer="momentum",
        lr=0.01, augment="none", mixup=0.0,
    )  # fmt: skip
    again = sharefold.load(tmp_path / "net", model=net("residual", seed=3))
    assert sum(p.numel() for p in again.parameters()) == size and report.updates == 4
    # Figures of the network before are none of this one.
    metrics = config_of(again).metrics
    assert metrics.keys() == {"params", "top1", "finetune"} and metrics["top1"] == report.top1_after
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(again), logits(start), rtol=1e-2, atol=1e-2)
