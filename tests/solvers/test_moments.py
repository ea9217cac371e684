"""Moments, added up batch by batch, against all samples at once in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.solvers.moments import Moments, PairSums


def pairs(groups: int = 3, features: int = 5, outputs: int = 2, count: int = 700) -> tuple[Tensor, Tensor]:
    """Inputs (G, N, P) and outputs (G, O, P), float64, none of them of mean 0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, features, count, generator=generator, dtype=torch.float64) + torch.arange(5.0)[:features, None]
    y = x[:, :outputs] ** 2 + torch.randn(groups, outputs, count, generator=generator, dtype=torch.float64)
    return x, y


def added(x: Tensor, y: Tensor, cuts: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Moments:
    found = Moments(dtype)
    for part, other in zip(x.tensor_split(cuts, 2), y.tensor_split(cuts, 2), strict=True):
        found.add(part, other)
    return found


def reference(x: Tensor, y: Tensor, centered: bool) -> PairSums:
    """Sample by sample, in float64."""
    x, y = x.double(), y.double()
    mean, mean_y = x.mean(2), y.mean(2)
    a, b = (x - mean[..., None], y - mean_y[..., None]) if centered else (x, y)
    count = x.shape[2]
    gram = torch.stack([sum(torch.outer(v, v) for v in group.T) / count for group in a])
    cross = torch.stack([sum(map(torch.outer, out.T, group.T)) / count for out, group in zip(b, a, strict=True)])
    return PairSums(gram, mean, cross, mean_y, b.square().mean(2).flatten())


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("cuts", [(), (1,), (100, 100, 699)])
def test_however_cut_they_are_those_of_all_samples(centered: bool, cuts: tuple[int, ...]) -> None:
    x, y = pairs()
    sums = added(x, y, cuts)
    found, expected = sums.pairs(centered), reference(x, y, centered)
    assert sums.count == 700 and found is not None
    for key, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, key), value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("centered", [False, True])
def test_single_precision_is_near_and_its_means_are_exact(centered: bool) -> None:
    x, y = (t.float() for t in pairs())
    found, expected = added(x, y, (300,), torch.float32).pairs(centered), reference(x, y, centered)
    assert found is not None and found.gram.dtype == found.cross.dtype == torch.float32
    assert found.mean.dtype == found.mean_y.dtype == torch.float64
    for key, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, key).double(), value, rtol=1e-4, atol=1e-3, msg=key)


def test_variance_is_that_of_the_outputs_by_channel() -> None:
    x, y = pairs(groups=2, outputs=3)
    found = added(x, y, (50,)).pairs(True)
    assert found is not None and found.variance.shape == (6,)
    torch.testing.assert_close(found.variance, y.var(2, unbiased=False).flatten())


def test_constant_outputs_have_no_negative_variance() -> None:
    x, y = pairs()
    found = added(x, torch.full_like(y, 1e4 + 0.1), (77, 200), torch.float32).pairs(True)
    assert found is not None and 0 <= float(found.variance.min()) <= float(found.variance.max()) < 1e-3


def test_a_nearly_constant_input_keeps_a_gram_that_is_no_less_than_0() -> None:
    x, y = pairs(groups=1)
    found = added(1e-3 * (x - x.mean(2, keepdim=True)) + 100, y, (300,), torch.float32).pairs(True)
    assert found is not None
    assert float(torch.linalg.eigvalsh(found.gram.double()).min()) > -1e-6 * 1e4


def test_nothing_and_what_is_not_finite_give_none() -> None:
    assert Moments(device="cpu").pairs(True) is None
    x, y = pairs()
    for broken in (x, y):
        spoiled = broken.clone()
        spoiled[0, 0, 5] = float("inf")
        sums = added(*((spoiled, y) if broken is x else (x, spoiled)), (300,))
        assert sums.pairs(True) is None and sums.pairs(False) is None


def test_results_may_be_asked_for_on_the_way() -> None:
    x, y = pairs()
    sums = Moments(device="cpu")
    sums.add(x[..., :100], y[..., :100])
    first = sums.pairs(True)
    assert first is not None
    torch.testing.assert_close(first.gram, reference(x[..., :100], y[..., :100], True).gram)
    sums.add(x[..., 100:], y[..., 100:])
    second = sums.pairs(True)
    assert second is not None
    torch.testing.assert_close(second.gram, reference(x, y, True).gram)
    torch.testing.assert_close(first.gram, reference(x[..., :100], y[..., :100], True).gram)  # it was not written into


def test_moments_stream_and_merge() -> None:
    patches = torch.randn(50, 2, 6, dtype=torch.float64) + 1
    samples = patches.permute(1, 2, 0)
    whole, first, second = Moments(), Moments(), Moments()
    whole.add(samples)
    first.add(samples[..., :20])
    second.add(samples[..., 20:])
    first = first.merged(second)
    for centered in (False, True):
        torch.testing.assert_close(first.covariance(centered), whole.covariance(centered))
    expected = torch.stack([torch.cov(patches[:, g].T, correction=0) for g in range(2)])
    torch.testing.assert_close(whole.covariance(centered=True), expected)
    torch.testing.assert_close(whole.mean, patches.mean(0))


@pytest.mark.parametrize("spread", [0.0, 1e-5, 1e-2, 1.0])
def test_the_covariance_of_nearly_constant_inputs_stays_positive(spread: float) -> None:
    """Far from zero and hardly varying: float32 sums leave a difference of rounding errors (efficientvit_m0)."""
    torch.manual_seed(0)
    noise = torch.randn(4000, 12)
    taken = Moments(torch.float32)
    for part in (3 + spread * noise).split(100):
        taken.add(part.T[None])
    found = taken.covariance(centered=True)[0]
    assert float(torch.linalg.eigvalsh(found.double()).min()) > 0
    if spread >= 1e-2:
        exact = (spread * noise.double()).T.cov(correction=0)
        assert float((found - exact).norm() / exact.norm()) < (0.02 if spread == 1 else 0.5)


@pytest.mark.parametrize("features", [192, 768])
def test_few_nearly_constant_inputs_of_many_features(features: int) -> None:
    """Errors of all entries add up: where a map is pooled to one position, a handful of patches is all there is."""
    torch.manual_seed(0)
    center = torch.randn(features)
    taken = Moments(torch.float32)
    for scale in torch.linspace(1, 1 + 1e-5, 6):
        taken.add((scale * center + 1e-4 * torch.randn(features))[None, :, None])
    assert float(torch.linalg.eigvalsh(taken.covariance(centered=True)[0].double()).min()) > 0


def test_moments_refuse_wrong_shapes_and_emptiness() -> None:
    with pytest.raises(SharefoldError, match="no sample"):
        Moments().covariance()
    taken = Moments()
    taken.add(torch.randn(1, 4, 3))
    with pytest.raises(SharefoldError, match="expected the groups and features of those before"):
        taken.add(torch.randn(1, 5, 3))
