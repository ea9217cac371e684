"""Weights of layers that are alike, put together at once."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import sharefold
from sharefold.finetune import finetune
from sharefold.finetune.whole import whole_factors
from sharefold.layers import running, shared_layers
from sharefold.layers.norm_fusion import norms_fused
from sharefold.layers.together import composed_together
from sharefold.plans import GroupPlan, Plan

STAGE = ("stage2.0.conv2", "stage2.1.conv1", "stage2.1.conv2")
PLANS = {
    "basis": [GroupPlan("a", "basis", STAGE, {"rank": 6})],
    "hybrid": [GroupPlan("a", "hybrid", STAGE, {"rank": 4, "own": 2, "pivoted": True})],
    "spatial": [GroupPlan(name, "spatial", (name,), {"rank": 5}) for name in STAGE],
    "svd": [GroupPlan(name, "svd", (name,), {"rank": 5, "pivoted": True}) for name in STAGE],
}
IMAGES = images(8)


def shared(kind: str, model: str = "residual") -> nn.Module:
    made = net(model, blocks=2)
    return sharefold.convert_(made, Plan(PLANS[kind], 0, 0), IMAGES, repair=False) and made


def gradients(model: nn.Module, together: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = copy.deepcopy(model).train()
    with whole_factors(model), running(model, "composed"):
        if together:
            with composed_together(model) as served:
                out = model(IMAGES)
            assert served == len(STAGE) and all(layer.given is None for layer in shared_layers(model).values())
        else:
            out = model(IMAGES)
        out.square().sum().backward()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", PLANS)
def test_outputs_and_gradients_are_those_of_layers_one_by_one(kind: str) -> None:
    model = shared(kind)
    (out, grads), (wanted, each) = gradients(model, True), gradients(model, False)
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5) and grads.keys() == each.keys()
    for name, gradient in each.items():
        assert torch.allclose(grads[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7), name


def test_under_autocast_weights_are_rounded_once_and_lie_channels_last() -> None:
    model = shared("basis").train()
    layers = shared_layers(model)
    with running(model, "composed"), torch.autocast("cpu", torch.bfloat16), composed_together(model):
        for name in STAGE:
            weight = layers[name].given
            assert weight.dtype == torch.bfloat16 and weight.is_contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(weight, layers[name].compose().bfloat16())
        assert model(IMAGES).isfinite().all()


def test_merged_norms_use_them() -> None:
    model = shared("basis").eval()
    norms = {name: record.norm for name, record in sharefold.calibrate(net("residual", blocks=2), IMAGES).graph.layers.items()}
    wanted = model(IMAGES)
    with norms_fused(model, norms), running(model, "composed"), composed_together(model) as served:
        assert served == len(STAGE)
        assert torch.allclose(model(IMAGES), wanted, rtol=1e-3, atol=1e-4)


def test_what_is_not_alike_or_kept_without_pivots_puts_its_own_together() -> None:
    for groups in (PLANS["hybrid"], PLANS["svd"][:1], PLANS["spatial"][:1]):
        model = net("residual", blocks=2)
        sharefold.convert_(model, Plan(groups, 0, 0), IMAGES, repair=False)
        with running(model, "composed"), composed_together(model) as served:
            assert served == 0


def test_an_exception_leaves_nothing_behind() -> None:
    model = shared("basis")
    with pytest.raises(RuntimeError), running(model, "composed"), composed_together(model):
        raise RuntimeError
    assert all(layer.given is None for layer in shared_layers(model).values())


class Checkpointed(nn.Module):
    """Runs its blocks again in the backward pass instead of keeping what they computed."""

    def __init__(self, body: nn.Module, again: bool) -> None:
        super().__init__()
        self.body, self.again = body, again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)


def test_checkpointed_networks_train() -> None:
    data, losses = (torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8), torch.arange(32) % 4), []
    for again in (True, False):
        model = Checkpointed(shared("basis"), again)
        report = finetune(model, data, epochs=1, batch_size=8, lr=0.01, augment="none", ema=0, seed=1, quiet=True)
        losses.append(report.history[-1]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_compiled_networks_use_them_and_learn_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once for all updates: new weights at every step are no reason to compile again."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: whole(model, backend=backend))
    start = shared("hybrid")
    data = (torch.randint(0, 255, (32, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 4, (32,)))
    states = []
    for compile in (False, True):
        model = copy.deepcopy(start)
        finetune(
            model, data, teacher=net("residual", blocks=2), epochs=2, batch_size=8, augment="none", quiet=True, device="cpu",
            compile=compile, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        )  # fmt: skip
        states.append(model.state_dict())
    assert len(graphs) == 2  # student and teacher
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=1e-4)
