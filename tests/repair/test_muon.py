"""Muon: steps go in all directions of a matrix alike, by the size that was asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sharefold.repair import muon as module
from sharefold.repair.learned import MATRIX, Parameters
from sharefold.repair.muon import Muon, orthogonal, suits


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 30), (1, 30, 8), (3, 6, 6)])
def test_singular_values_come_near_one_and_vectors_stay(shape, halves, monkeypatch) -> None:
    monkeypatch.setattr(module, "native", lambda device: halves)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1.5, shape[2]))
    found = orthogonal(given)
    assert found.shape == given.shape and found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    turned = left.mT @ found @ right.mT
    off = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) < (0.1 if halves else 1e-3)


def test_zeros_stay_zeros() -> None:
    assert not orthogonal(torch.zeros(1, 4, 5)).any()


@pytest.mark.parametrize(
    ("shape", "blocks", "wanted"),
    [
        ((16, 8, 3, 3), 1, True), ((16,), 1, False), ((16, 1, 3, 3), 16, False), ((16, 2, 3, 3), 4, True), ((1, 64), 1, False),
        ((10, 64), 1, True), ((1000, 1280), 1, False), ((1280, 320, 1, 1), 1, True), ((), 1, False), ((9, 4), 2, False),
    ],
)  # fmt: skip
def test_which_tensors_it_suits(shape, blocks, wanted) -> None:
    assert suits(shape, blocks) == wanted


def test_a_step_has_the_size_that_is_asked_for_and_goes_down() -> None:
    weight = nn.Parameter(torch.randn(6, 5, 2, 2))
    before, target = weight.detach().clone(), torch.randn(6, 5, 2, 2)
    optimizer = Muon([{"params": [weight], "lr": 0.01}])
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        if len(losses) == 1:
            assert float((weight.detach() - before).square().mean().sqrt()) == pytest.approx(0.01, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    unused = nn.Parameter(torch.ones(3, 3))
    Muon([{"params": [unused], "lr": 1.0}]).step()
    assert bool((unused == 1).all())


def test_groups_of_a_convolution_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 3, 3, 3))
    weight.grad = torch.randn(8, 3, 3, 3)
    halves = [nn.Parameter(part.detach().clone()) for part in weight.split(4)]
    for half, grad in zip(halves, weight.grad.split(4), strict=True):
        half.grad = grad.clone()
    moved = []
    for parameters, blocks in (([weight], 2), (halves, 1)):
        start = torch.cat([p.detach().clone() for p in parameters])
        Muon([{"params": parameters, "lr": 0.1, "blocks": blocks}]).step()
        moved.append(torch.cat([p.detach() for p in parameters]) - start)
    assert torch.allclose(moved[0], moved[1], rtol=0.05, atol=5e-3)


def test_what_moves_which_parameter() -> None:
    depthwise, grouped = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 3, groups=2)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), depthwise, grouped, nn.Linear(6, 3))
    muon, adamw = Parameters(model).optimizers(0.004)
    assert isinstance(muon, Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(group["params"][0])]: group["blocks"] for group in muon.param_groups}
    assert by_muon == {"0.weight": 1, "3.weight": 2, "4.weight": 1}
    others = {names[id(group["params"][0])] for group in adamw.param_groups}
    assert by_muon.keys() | others == set(names.values()) and not by_muon.keys() & others
    size = float(model[0].weight.detach().square().mean().sqrt())
    assert muon.param_groups[0]["lr"] == pytest.approx(MATRIX * 0.004 * size)
