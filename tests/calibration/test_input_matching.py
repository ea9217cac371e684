from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sharefold.calibration import images as images_of
from sharefold.calibration.images import matched
from sharefold.calibration.input_matching import _mismatch, match_statistics
from sharefold.errors import SharefoldWarning


@pytest.fixture
def trained() -> nn.Module:
    """Three convolutions whose BatchNorms remember smooth, correlated images."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Dropout(0.5),
    )  # fmt: skip
    for norm in model:
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    with torch.no_grad():
        for _ in range(10):
            model(smooth(100))
    return model.eval()


@torch.no_grad()
def mismatch(model: nn.Sequential, images: Tensor) -> float:
    """Mean over BatchNorms of what is matched, written out: squared errors of means over variances, and of the ratios of
    standard deviations."""
    found, x = [], images
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            ratio = ((variance + layer.eps) / (layer.running_var + layer.eps)).sqrt()
            found.append(((mean - layer.running_mean) ** 2 / (layer.running_var + layer.eps) + (ratio - 1) ** 2).mean())
        x = layer(x)
    return float(torch.stack(found).mean())


def smooth(count: int) -> Tensor:
    coarse = torch.randn(count, 3, 3, 3) + torch.randn(count, 1, 1, 1) + 0.5
    return nn.functional.interpolate(coarse, size=(12, 12), mode="bilinear")


def test_mismatch_is_zero_for_equal_and_known_for_shifted_statistics() -> None:
    norm = nn.BatchNorm2d(3, eps=0.0)
    images = torch.randn(50, 3, 6, 6)
    mean, variance = images.mean((0, 2, 3)), images.var((0, 2, 3), unbiased=False)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    assert float(_mismatch(norm, images)) == pytest.approx(0, abs=1e-9)
    norm.running_mean.copy_(mean + 2 * variance.sqrt())
    assert float(_mismatch(norm, images)) == pytest.approx(4, rel=1e-4)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(4 * variance)
    assert float(_mismatch(norm, images)) == pytest.approx(0.25, rel=1e-4)


def test_other_images_come_close_and_stay_in_range(trained: nn.Module) -> None:
    noise = torch.randn(120, 3, 12, 12).clamp(-2, 2)
    before = noise.clone()
    matched = match_statistics(trained, noise, 60, batch_size=60)
    assert torch.equal(noise, before) and matched.shape == noise.shape
    assert mismatch(trained, matched) < 0.3 * mismatch(trained, noise)
    assert float(matched.min()) >= float(noise.min()) and float(matched.max()) <= float(noise.max())


def test_images_that_fit_already_hardly_move(trained: nn.Module) -> None:
    images, noise = smooth(100), torch.randn(100, 3, 12, 12)
    assert mismatch(trained, images) < 0.1 * mismatch(trained, noise)
    assert mismatch(trained, match_statistics(trained, images, 10)) <= mismatch(trained, images)


def test_same_seed_same_images_and_nothing_else_changes(trained: nn.Module) -> None:
    images = torch.randn(40, 3, 12, 12)
    trained[0].train()
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    random_state = torch.get_rng_state()
    with torch.no_grad():
        first = match_statistics(trained, images, 3, batch_size=10, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first, match_statistics(trained, images, 3, batch_size=10, seed=3))
    assert not torch.equal(first, match_statistics(trained, images, 3, batch_size=10, seed=4))
    assert not first.requires_grad
    assert trained[0].training and not trained[1].training
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in trained.parameters())
    assert not any(m._forward_pre_hooks for m in trained.modules())


def test_without_norms_or_steps_images_come_back(trained: nn.Module) -> None:
    images = torch.randn(4, 3, 12, 12)
    for model, steps in ((nn.Conv2d(3, 4, 3), 5), (trained, 0)):
        same = match_statistics(model, images, steps)
        assert torch.equal(same, images) and same is not images


def test_norms_that_saw_no_data_are_not_matched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval()
    images = torch.randn(4, 3, 12, 12)
    assert torch.equal(match_statistics(model, images, 5), images)
    model[3].running_mean.fill_(0.5)
    assert not torch.equal(match_statistics(model, images, 5), images)


def test_large_images_are_matched_in_small_batches(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """224 x 224 and smaller ones are matched, what would take minutes is not; every batch is told when it is done."""
    seen: list[int] = []
    trained.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr(images_of, "BATCH_PIXELS", 3 * 96 * 96)
    told: list[tuple[str, int, int]] = []
    large = torch.randn(6, 3, 96, 96)
    found = matched(trained, large, progress=lambda *words: told.append(words))
    assert not torch.equal(found, large) and set(seen) == {3}
    assert told == [("matching procedural images", 1, 2), ("matching procedural images", 2, 2)]
    huge = torch.randn(1, 3, 400, 400)
    assert matched(trained, huge) is huge


class Odd(nn.Module):
    """One convolution and its norm, run in a way that gradients may not pass."""

    def __init__(self, body: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), body
        self.norm.running_var.fill_(2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def without_gradients(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.norm(net.conv(x))


@pytest.mark.parametrize(
    "body",
    [without_gradients, lambda net, x: net.conv(x), lambda net, x: net.norm(net.conv(x.detach()))],
    ids=["no gradients", "no norm runs", "detached"],
)
def test_networks_without_gradients_get_images_that_are_not_matched(body: Callable[[nn.Module, Tensor], Tensor]) -> None:
    images = torch.randn(4, 3, 16, 16)
    with pytest.warns(SharefoldWarning, match="procedural images are not matched to the network's norms"):
        found = match_statistics(Odd(body), images, 2)
    assert torch.equal(found, images) and not found.requires_grad


def test_steps_that_are_not_finite_move_nothing() -> None:
    net, images = Odd(lambda net, x: net.norm(net.conv(x))).half(), torch.randn(4, 3, 16, 16).half()
    net.norm.running_var.fill_(1e-7), net.norm.running_mean.fill_(3e4)
    with pytest.warns(SharefoldWarning, match="not matched"):
        assert torch.equal(match_statistics(net, images, 3), images)


def test_what_networks_do_to_their_input_is_no_hindrance() -> None:
    images = torch.randn(4, 3, 16, 16)
    keyword = Odd(lambda net, x: net.norm(input=net.conv(x)))
    in_place = Odd(lambda net, x: net.norm(net.conv(x.sub_(0.5))))
    for net in (keyword, in_place):
        before = images.clone()
        found = match_statistics(net, images, 3)
        assert not torch.equal(found, images) and torch.equal(images, before)
        with torch.inference_mode():
            assert torch.allclose(match_statistics(net, images, 3), found)
