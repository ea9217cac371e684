"""Input moments against all patches gathered by brute force."""

from __future__ import annotations

import pytest
import torch
from networks import BLOCKS, images, net
from torch import Tensor, nn

from sharefold.calibration import statistics as module
from sharefold.calibration.statistics import Statistics, shrunk, statistics_of
from sharefold.errors import SharefoldError
from sharefold.graph import analyze
from sharefold.solvers.moments import Moments

IMAGES = images(10)


@torch.no_grad()
def patches(model: nn.Module, name: str, inputs: Tensor = IMAGES) -> Tensor:
    """Every input patch (samples, G, N) of a layer, in float64."""
    seen: list[Tensor] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.eval()(inputs)
    handle.remove()
    x = torch.cat(seen).double()
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, layer.in_features)
    assert isinstance(layer, nn.Conv2d)
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, layer.groups, columns.shape[1] // layer.groups)


def brute_force(x: Tensor, centered: bool) -> Tensor:
    mean = x.mean(0) if centered else torch.zeros_like(x[0])
    y = x - mean
    return torch.einsum("sgn,sgm->gnm", y, y) / len(x)


@pytest.mark.parametrize("kind", list(BLOCKS))
@pytest.mark.parametrize("centered", [False, True])
def test_moments_are_those_of_all_patches(kind: str, centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharefold.calibration.statistics.shrunk", lambda moment, noise: moment)
    model = net(kind)
    names = list(analyze(model, IMAGES[:1]).layers)
    statistics = Statistics(model, IMAGES, centered=dict.fromkeys(names, centered), batch_size=4)
    found = statistics.moments(names)
    assert statistics.passes == 1
    for name in names:
        x = patches(model, name)
        expected = brute_force(x, centered).float()
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        torch.testing.assert_close(statistics.means[name].double(), x.mean(0), rtol=1e-4, atol=1e-4)


def test_a_mean_that_a_norm_or_bias_takes_up_is_taken_out() -> None:
    model = net("residual")
    statistics = statistics_of(model, analyze(model, IMAGES[:1]), IMAGES)
    assert all(statistics.centered.values())
    first, second = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, bias=False)
    plain = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(800, 5))
    found = statistics_of(plain, analyze(plain, IMAGES[:1]), IMAGES).centered
    assert found == {"0": False, "2": False, "4": True}


def test_sampled_positions_estimate_the_same_moment() -> None:
    model = net("residual")
    many, name = images(500, 4), "stage1.1.conv1"
    sampled = Statistics(model, many, centered={name: True}).moments([name])[name][0].double()
    x = patches(model, name, many)
    full = brute_force(x, True)[0]
    assert len(x) > 4 * 16_384  # fewer positions were sampled than there are
    assert 1e-6 < float((sampled - full).norm() / full.norm()) < 0.05


def test_shrinking_makes_any_moment_positive_definite_and_keeps_its_trace() -> None:
    x = torch.randn(5, 3, 40)
    moment = brute_force(x, False)
    assert float(torch.linalg.eigvalsh(moment).min()) < 1e-9
    result = shrunk(moment, torch.full((3,), 2.0))
    assert float(torch.linalg.eigvalsh(result).min()) > 0
    torch.testing.assert_close(result.diagonal(dim1=1, dim2=2).sum(1), moment.diagonal(dim1=1, dim2=2).sum(1))
    sure, unknown = shrunk(moment, torch.zeros(3)), shrunk(moment, torch.full((3,), float("inf")))
    assert torch.dist(sure, moment) < 1e-3 * moment.norm()
    assert torch.dist(result, moment) < torch.dist(unknown, moment)
    eye = moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(40)
    torch.testing.assert_close(unknown, (moment + eye) / 2)  # never more than half


def test_noise_is_what_moments_of_other_images_differ_by() -> None:
    """On average over many draws it is the squared distance from the true moment, also where samples of a batch are alike."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator)
    truth, distances, noises = (root @ root.T)[None], [], []
    for _ in range(200):
        moments = Moments()
        for _ in range(12):
            alike = torch.randn(3, 6, generator=generator).repeat_interleave(5, 0)  # fifteen patches of three images
            moments.add((alike @ root.T).T[None])
        distances.append(float((moments.covariance() - truth).square().sum()))
        noises.append(float(moments.noise()))
    assert sum(noises) == pytest.approx(sum(distances), rel=0.15)
    single = Moments()
    single.add(torch.randn(1, 6, 4, generator=generator))
    assert bool(torch.isinf(single.noise()).all())


def test_memory_is_bounded_and_the_model_left_alone() -> None:
    model = net("residual").train()
    names = list(analyze(model, IMAGES[:1]).layers)
    limit = Statistics(model, IMAGES).bytes_of(names[:3])
    statistics = Statistics(model, IMAGES, cache_bytes=limit)
    runs = statistics.batches([[name] for name in names])
    assert sorted(index for run in runs for index in run) == list(range(len(names))) and len(runs) > 3
    for run in runs:
        wanted = [names[index] for index in run]
        assert statistics.moments(wanted).keys() == set(wanted)
        held = sum(t.numel() * 4 for t in statistics.cache.values())
        assert held <= max(limit, statistics.bytes_of(wanted))
    again = statistics.moments([names[0]])[names[0]]
    assert torch.equal(again, Statistics(model, IMAGES).moments([names[0]])[names[0]])
    assert model.training and not any(module._forward_hooks for module in model.modules())


class Forks(nn.Module):
    """A network with a layer that no image reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).mean((2, 3))


def test_layers_that_cannot_be_measured_are_named() -> None:
    model = Forks()
    with pytest.raises(SharefoldError, match="layer idle was not reached"):
        Statistics(model, IMAGES).moments(["idle"])
    with pytest.raises(SharefoldError, match="no dense convolution or Linear of plain torch"):
        Statistics(net("residual"), IMAGES).moments(["bn"])
    deep = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    deep[0].weight.data.fill_(float("inf"))
    with pytest.raises(SharefoldError, match="NaN or infinite"):
        Statistics(deep, IMAGES).moments(["1"])
    assert not any(module._forward_hooks for module in (*model.modules(), *deep.modules()))


def test_positions_of_a_layer_do_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLES_FLOOR", 64)
    monkeypatch.setattr(module, "SAMPLES_PER_FEATURE", 1)
    model, given = net(), images(16)
    alone = Statistics(model, given).moments(["stage1.1.conv1"])
    together = Statistics(model, given).moments(["stem", "stage1.0.conv2", "stage1.1.conv1"])
    assert torch.equal(alone["stage1.1.conv1"], together["stage1.1.conv1"])
    seeded = Statistics(model, given, seed=1).moments(["stage1.1.conv1"])
    assert not torch.equal(alone["stage1.1.conv1"], seeded["stage1.1.conv1"])


def test_few_images_come_in_batches_that_tell_how_far_they_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    noises: list[Tensor] = []
    monkeypatch.setattr(module, "shrunk", lambda moment, noise: (noises.append(noise), moment)[1])
    model = net()
    for count in (1, 2, 24, 96):
        Statistics(model, images(count)).moments(["stem"])
    assert noises[0].isinf().all() and torch.isfinite(torch.stack(noises[1:])).all()
    assert 0 < float(noises[3]) < float(noises[2])
