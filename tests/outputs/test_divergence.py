"""The divergence of every kind of output against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from answer_tables import IMAGES, N, Table, draw, reading
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.outputs import Comparison, Divergence, OutputReading, agreement
from sharefold.outputs.divergence import centred


def compared(a: list[Tensor], b: list[Tensor], read: OutputReading, **options: int) -> Tensor:
    return Comparison(Table(*a), IMAGES, read, **options).divergence(Table(*b)).per_image


def kl(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Brute force, float64: (n,), mean over positions."""
    p, q = a.double().softmax(axis), b.double().softmax(axis)
    return (p * (p / q).log()).sum(axis).reshape(N, -1).mean(1)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 1), ((5, 3, 2), 1), ((4, 7), 2), ((2, 3, 4), 3)])
def test_logits_are_compared_by_kl_on_their_axis(shape: tuple[int, ...], axis: int) -> None:
    a, b = draw(*shape), draw(*shape, seed=1)
    torch.testing.assert_close(compared([a], [b], reading(("logits", axis))), kl(a, b, axis), rtol=1e-5, atol=1e-7)
    found = compared([a.softmax(axis)], [b.softmax(axis)], reading(("probabilities", axis), activated=True))
    torch.testing.assert_close(found, kl(a, b, axis), rtol=1e-5, atol=1e-6)


def test_a_classifier_is_compared_as_ever() -> None:
    a, b = draw(5), draw(5, seed=1)
    found = agreement(Table(a), Table(b), IMAGES, reading=reading(("logits", 1)))
    wanted = nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.kl == pytest.approx(float(wanted), rel=1e-6)
    assert found.top1 == float((a.argmax(1) == b.argmax(1)).double().mean())


def test_numbers_are_compared_over_their_variance_a_channel() -> None:
    scale = torch.tensor([1.0, 10.0, 0.2])[:, None]
    a = draw(3, 4) * scale + torch.arange(12.0).reshape(3, 4)  # what is the same for every image is no answer
    b = a + 0.1 * scale * draw(3, 4, seed=1)
    variance = a.double().var(0).mean(1)
    wanted = ((a - b).double().square() / variance[:, None]).mean((1, 2))
    torch.testing.assert_close(compared([a], [b], reading(("regression", 1))), wanted, rtol=1e-4, atol=0.0)


def test_images_and_vectors_have_one_scale() -> None:
    a = draw(3, 4) * torch.tensor([1.0, 3.0, 0.1])[:, None]
    b = a + draw(3, 4, seed=1)
    wanted = (a - b).double().square().mean((1, 2)) / a.double().var(0).mean()
    for kind in ("image", "embedding"):
        torch.testing.assert_close(compared([a], [b], reading((kind, 1))), wanted, rtol=1e-5, atol=0.0)


def test_one_number_an_image() -> None:
    a = draw()
    wanted = (0.5**2 / a.double().var()).expand(N)
    torch.testing.assert_close(compared([a], [a + 0.5], reading(("regression", None))), wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("kind", ["binary", "multi-label"])
def test_yes_or_no_is_compared_with_the_answer_that_never_changes(kind: str) -> None:
    a, b = draw(3, scale=2), draw(3, seed=1)
    p, q = a.double().sigmoid(), b.double().sigmoid()
    each = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean(1)

    def entropy(x: Tensor) -> Tensor:
        return -(x * x.log() + (1 - x) * (1 - x).log())

    information = entropy(p.mean(0)).mean() - entropy(p).mean()
    read = reading((kind, 1))
    torch.testing.assert_close(compared([a], [b], read), each / information, rtol=1e-4, atol=1e-6)
    constant = p.mean(0).log() - (1 - p.mean(0)).log()
    assert float(compared([a], [constant.float().expand(N, 3)], read).mean()) == pytest.approx(1.0, rel=1e-4)


def test_each_of_several_outputs_costs_one_where_it_answers_the_same_always() -> None:
    logits, numbers = draw(5, scale=3), 100 * draw(4) + 1000
    share = logits.double().softmax(1).mean(0).log().float().expand(N, 5)
    mean = numbers.mean(0).expand(N, 4)
    read = reading(("logits", 1), ("regression", 1))
    both = Comparison(Table(logits, numbers), IMAGES, read).divergence(Table(share, mean))
    assert both.leaves["0"] == pytest.approx(1.0, rel=1e-4) and both.leaves["1"] == pytest.approx((N - 1) / N, rel=1e-4)
    assert both.mean == pytest.approx(sum(both.leaves.values()))
    weighed = reading(("logits", 1), ("regression", 1), weights=(0.5, 3.0))
    found = Comparison(Table(logits, numbers), IMAGES, weighed).divergence(Table(share, mean))
    assert found.mean == pytest.approx(0.5 * both.leaves["0"] + 3 * both.leaves["1"])


def test_labels_differ_or_do_not() -> None:
    a = torch.tensor([[0, 1], [1, 1], [2, 2], [0, 0], [1, 2], [0, 1]])
    b = a.clone()
    b[0, 0], b[1] = 3, 0
    assert compared([a], [b], reading(("labels", None))).tolist() == [0.5, 1.0, 0, 0, 0, 0]


@pytest.mark.parametrize("n", [1, 2])
def test_channels_that_never_move_and_few_images_give_finite_numbers(n: int) -> None:
    a = torch.cat([draw(2), torch.ones(N, 2)], 1)
    found = Comparison(Table(a), IMAGES[:n], reading(("regression", 1))).divergence(Table(a + 0.1)).mean
    assert 0 < found < math.inf
    same = Comparison(Table(torch.full((N, 3), 7.0)), IMAGES[:n], reading(("regression", 1)))
    assert same.divergence(Table(torch.full((N, 3), 7.7))).mean == pytest.approx(0.01, rel=1e-3)


def test_batches_memory_and_order_change_nothing() -> None:
    a, b = [draw(5), draw(3, 4)], [draw(5, seed=1), draw(3, 4, seed=1)]
    read = reading(("logits", 1), ("regression", 1))
    whole = compared(a, b, read)
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"cache_bytes": 0}):
        torch.testing.assert_close(compared(a, b, read, **options), whole, rtol=1e-5, atol=1e-8)


def test_the_original_runs_once_while_its_answers_fit_memory() -> None:
    class Counted(Table):
        runs = 0

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            self.runs += 1
            return super().forward(x)

    net = Counted(draw(5))
    comparison = Comparison(net, IMAGES, reading(("logits", 1)), batch_size=3)
    comparison.divergence(Table(draw(5, seed=1)))
    first = net.runs
    comparison.divergence(Table(draw(5, seed=2)))
    assert net.runs == first == 2


def test_rounding_is_no_reason() -> None:
    a = draw(5)
    comparison = Comparison(Table(a), IMAGES, reading(("logits", 1)))
    near = comparison.divergence(Table(a + draw(5, seed=1, scale=1e-7)))
    nothing = comparison.divergence(Table(a))
    far = comparison.divergence(Table(a + draw(5, seed=1, scale=1e-2)))
    nearly = comparison.divergence(Table(a + draw(5, seed=1, scale=1e-2) + draw(5, seed=2, scale=1e-7)))
    assert comparison.ties(near, nothing) and comparison.ties(far, nearly)
    assert not comparison.ties(far, nothing) and comparison.better(nothing, far) and not comparison.better(far, nothing)
    assert not comparison.better(near, nothing) and not comparison.better(nothing, near)
    assert not comparison.better(math.nan, far) and comparison.better(far, math.inf)


@pytest.mark.parametrize("kind", ["logits", "regression"])
def test_half_precision_is_compared_in_float32(kind: str) -> None:
    a, b = (100 * draw(5, 4, seed=seed) for seed in (0, 1))
    found = compared([a.half()], [b.half()], reading((kind, 1)))
    torch.testing.assert_close(found, compared([a.half().float()], [b.half().float()], reading((kind, 1))), rtol=1e-5, atol=0.0)
    assert bool(torch.isfinite(found).all())


def test_outputs_that_are_no_numbers_are_infinitely_far() -> None:
    a = draw(3)
    b = a.clone()
    b[2, 1] = math.nan
    found = compared([a], [b], reading(("regression", 1)))
    assert found[2] == math.inf and bool(torch.isfinite(found[[0, 1, 3, 4, 5]]).all())


def test_other_shapes_are_refused() -> None:
    with pytest.raises(SharefoldError, match="cannot be compared"):
        compared([draw(5)], [draw(4)], reading(("logits", 1)))


def test_the_users_own_criterion() -> None:
    a, b = draw(3), draw(3, seed=1)
    comparison = Comparison(Table(a), IMAGES, criterion=lambda x, y: (x[0] - y[0]).abs().amax(1), batch_size=4)
    torch.testing.assert_close(comparison.divergence(Table(b)).per_image, (a - b).abs().amax(1).double())
    assert comparison.figures(Table(b))[-1].value == pytest.approx(float((a - b).abs().amax(1).mean()))
    with pytest.raises(SharefoldError, match=r"\(4,\)"):
        Comparison(Table(a), IMAGES, criterion=lambda x, y: (x[0] - y[0]), batch_size=4).divergence(Table(b))


def test_losses_are_over_the_variance_and_keep_brightness() -> None:
    logits, image = draw(5), draw(3, 4, 4)
    divergence = Divergence(reading(("logits", 1), ("image", 1)), [[logits, image]])
    student = [(logits + 1).requires_grad_(), (image + 0.5).requires_grad_()]
    shifted, brighter = divergence.losses(student, [logits, image])
    assert shifted.item() < 1e-10  # no prediction depends on it
    wanted = 0.25 / image.double().var(0).mean()
    assert brighter.item() == pytest.approx(float(wanted), rel=1e-4)
    moved = divergence.losses([(logits + torch.eye(5)[0]).requires_grad_(), image.requires_grad_()], [logits, image])[0]
    change = centred(logits + torch.eye(5)[0]) - centred(logits)
    assert moved.item() == pytest.approx(float(change.square().mean() / centred(logits).square().mean()), rel=1e-5)


@pytest.mark.parametrize("mask", [-1e9, -math.inf])
@pytest.mark.parametrize("scaled", [(), ("0",)])
def test_classes_that_a_network_masks_hide_nothing_of_the_others(mask: float, scaled: tuple[str, ...]) -> None:
    """Beside -1e9 float32 knows nothing of logits of a few units, and nothing was learnt by them."""
    hidden = torch.tensor([False, False, True, False, False])
    logits, other = (tensor.masked_fill(hidden, mask) for tensor in (draw(5), draw(5, seed=1)))
    student = other.clone().requires_grad_()
    (loss,) = Divergence(reading(("logits", 1)), [[logits]]).losses([student], [logits], scaled=scaled)
    a, b = logits[:, ~hidden], other[:, ~hidden]
    (alone,) = Divergence(reading(("logits", 1)), [[a]]).losses([b.clone().requires_grad_()], [a], scaled=scaled)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-5)
    loss.backward()
    assert student.grad is not None and bool((student.grad != 0).any(0).eq(~hidden).all()) and bool(student.grad.isfinite().all())


def test_classes_at_minus_infinity_cost_nothing() -> None:
    a, b = draw(5), draw(5, seed=1)
    masked = [torch.cat([logits, torch.full((N, 1), -math.inf)], 1) for logits in (a, b)]
    found = compared([masked[0]], [masked[1]], reading(("logits", 1)))
    torch.testing.assert_close(found, kl(a, b, 1), rtol=1e-5, atol=1e-7)
    broken = compared([masked[0]], [torch.full((N, 6), -math.inf)], reading(("logits", 1)))
    assert bool(broken.isinf().all())


@pytest.mark.parametrize("kind", ["regression", "binary", "multi-label", "image"])
def test_masked_numbers_cost_nothing(kind: str) -> None:
    """The mean of minus infinity and the others would be no number, and neither would be what is learned."""
    a, b = draw(5), draw(5, seed=1)
    hidden = torch.arange(6) == 5
    one, two = (torch.cat([numbers, torch.full((N, 1), -math.inf)], 1) for numbers in (a, b))
    divergence = Divergence(reading((kind, 1)), [[one]])
    found = divergence.each([one], [two])[0]
    assert bool(found.isfinite().all()) and bool((found > 0).all())
    if kind == "regression":
        torch.testing.assert_close(found, compared([a], [b], reading((kind, 1))) * 5 / 6, rtol=1e-4, atol=0.0)
    student = two.clone().requires_grad_()
    (loss,) = divergence.losses([student], [one])
    loss.backward()
    assert loss.isfinite() and student.grad is not None and bool((student.grad == 0).all(0).eq(hidden).all())
    assert bool(divergence.each([one], [one.masked_fill(hidden, 1.0)]).isinf().all()) == (kind in ("regression", "image"))


def test_rounding_is_that_of_the_classes_that_are_not_masked() -> None:
    """Relative to a mask of -1e9 every divergence was a tie, and no repair was ever kept."""
    logits = draw(5)
    masked = torch.cat([logits, torch.full((N, 1), -1e9)], 1)
    seen, alone = (Comparison(Table(one), IMAGES, reading(("logits", 1))).noise for one in (masked, logits))
    assert 0.2 * alone < seen < 5 * alone


def test_logits_that_are_scaled_later_are_compared_at_their_best_scale() -> None:
    logits, other = draw(5), draw(5, seed=1)
    divergence = Divergence(reading(("logits", 1)), [[logits]])
    source = divergence.reading.leaves[0].source

    def loss(student: Tensor) -> float:
        return divergence.losses([student.clone().requires_grad_()], [logits], scaled={source})[0].item()

    wanted, given = centred(logits), centred(other)
    factor = (wanted * given).sum() / given.square().sum()
    if factor < 0:
        other, given, factor = -other, -given, -factor
    best = (factor * given - wanted).square().mean() / wanted.square().mean()
    assert loss(other) == pytest.approx(float(best), rel=1e-4)
    assert loss(3 * other + 2) == pytest.approx(loss(other), rel=1e-4)
    assert loss(logits) == pytest.approx(0, abs=1e-5) and loss(-logits) == pytest.approx(2, rel=1e-5)
    noise = (-logits + 0.3 * other).requires_grad_()  # away from what is wanted there is a way back
    divergence.losses([noise], [logits], scaled={source})[0].backward()
    assert noise.grad is not None and float((noise.grad * (logits - noise.detach())).sum()) < 0
    plain = divergence.losses([(2 * logits).requires_grad_()], [logits], scaled={"another"})[0].item()
    assert plain == pytest.approx(1.0, rel=1e-4)  # not scaled later: as it is


def test_logits_alone_seed_as_a_drawn_label_does() -> None:
    logits = draw(5).requires_grad_()
    divergence = Divergence(reading(("logits", 1)), [[logits.detach()]])
    seed = divergence.fisher_seed([logits], torch.Generator().manual_seed(3))
    drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    assert seed is not None and torch.equal(seed, nn.functional.cross_entropy(logits, drawn, reduction="sum"))


@pytest.mark.parametrize(
    ("kind", "axis"), [("regression", 1), ("logits", 1), ("logits", 2), ("multi-label", 1), ("probabilities", 2), ("image", 1)]
)
def test_squared_gradients_of_the_seed_foretell_the_divergence(kind: str, axis: int) -> None:
    """Half of E[(g . d)^2] is the divergence that a small change d costs, all outputs together."""
    a = draw(3, 4, scale=1.5).double()
    a = a.softmax(axis) if kind == "probabilities" else a
    other = 10 * draw(2, seed=4)
    change = [1e-2 * draw(3, 4, seed=5).double(), 1e-2 * draw(2, seed=6)]
    if kind == "probabilities":
        change[0] = 0.1 * a * (change[0] - (a * change[0]).sum(axis, keepdim=True)) / 0.1
    read = reading((kind, axis), ("regression", 1), activated=kind == "probabilities")
    divergence = Divergence(read, [[a.float(), other]])
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    draws = 3000
    for _ in range(draws):
        leaves = [a.float().requires_grad_(), other.clone().requires_grad_()]
        seed = divergence.fisher_seed(leaves, generator)
        assert seed is not None
        grads = torch.autograd.grad(seed, leaves)
        total += float(sum((g * c).flatten(1).sum(1) for g, c in zip(grads, change, strict=True)).square().mean()) / draws
    moved = [(a + change[0]).float(), other + change[1].float()]
    found = float(divergence.total(divergence.each([a.float(), other], moved)).mean())
    assert total / 2 == pytest.approx(found, rel=0.1)
