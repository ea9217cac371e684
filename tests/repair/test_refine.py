"""Refinement: it learns from the images that fit, is judged by others, and leaves everything else as it was."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import Small, images, net, same, state
from repair_works import calibration_on
from torch import Tensor, nn

import sharefold
from sharefold.calibration.calibrate import calibrate
from sharefold.data.views import pasted, random_views
from sharefold.errors import SharefoldError
from sharefold.layers import Bank, BasisConv, add_bank, form_of
from sharefold.measure import agreement
from sharefold.outputs import Comparison
from sharefold.outputs.divergence import centred
from sharefold.repair import refine as module
from sharefold.repair.guard import Guard
from sharefold.repair.refine import refine
from sharefold.repair.refine_loss import lessons, relative_errors
from sharefold.repair.step_record import StepRecord
from sharefold.state_dicts import trial


def converted(teacher: Small, rank: int = 7) -> Small:
    """A network whose four block convolutions share one random-subspace basis: a damaged conversion."""
    model = copy.deepcopy(teacher)
    layers = [conv for block in model.layer1 for conv in (block.conv1, block.conv2)]
    stacked = torch.cat([conv.weight.detach().flatten(1) for conv in layers])
    basis = torch.linalg.svd(stacked, full_matrices=False).Vh[:rank]
    bank = add_bank(model, "group", Bank({"basis": basis.reshape(rank, 8, 3, 3).contiguous()}, uses=4))
    for block in model.layer1:
        for key in ("conv1", "conv2"):
            conv = getattr(block, key)
            form = form_of(conv)
            assert form is not None
            setattr(block, key, BasisConv(form, conv.weight.detach().flatten(1) @ basis.T, bank))
    return model


@pytest.fixture
def pair() -> tuple[Small, Small, Tensor, Tensor]:
    teacher = Small()
    with torch.no_grad():
        teacher.head.weight.mul_(20)
        for block in teacher.layer1:
            block.bn2.running_mean.normal_(0, 0.1)
            block.bn2.running_var.uniform_(0.05, 0.2)
    teacher.eval()
    images = torch.randn(96, 3, 12, 12)
    return teacher, converted(teacher, 8), images[:64], images[64:]


def refined(
    teacher: nn.Module, model: nn.Module, images: Tensor, held_out: Tensor, now: float | None = None, **options: Any
) -> StepRecord:
    """Refines ``model`` on ``images``; all of ``held_out`` decide."""
    cal = calibration_on(teacher, images, held_out)
    return refine(model, cal, guard=Guard(cal.comparison(held_out), now), **options)


def test_lowers_held_out_kl_much(pair) -> None:
    teacher, model, images, held_out = pair
    cal = calibration_on(teacher, images, held_out)
    frozen = state(teacher)
    statistics = [block.bn2.running_var.clone() for block in model.layer1]
    result = refine(model, cal, guard=Guard(cal.comparison(held_out)), epochs=12, batch_size=16)
    assert result["kept"] and result["epochs"] == 12
    assert result["kl_before"] > 0.01
    assert result["kl_after"] < 0.6 * result["kl_before"]
    assert agreement(teacher, model, held_out).kl == pytest.approx(result["kl_after"], rel=1e-5)
    assert result["kl_after"] == result["history"][-1]
    assert same(state(cal.original), frozen)
    assert all(torch.equal(a, block.bn2.running_var) for a, block in zip(statistics, model.layer1, strict=True))


class Halved:
    """A scale of the logits: half of what they are."""

    divergence = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def settle(self) -> None:
        self.model.weight.mul_(0.5)

    @torch.no_grad()
    def undo(self) -> None:
        self.model.weight.mul_(2.0)


@pytest.mark.parametrize(
    ("divergences", "remains"),
    [([0.2, 0.6], 2.0), ([0.7, 0.9], 2.0), ([0.2, 1.1], 0.0), ([1.5, 1.1], 0.0), ([0.2, math.nan], 1.0)],
    ids=["end", "end, by little", "no better than the start", "never better", "no longer finite"],
)
def test_the_end_counts_and_not_the_states_on_the_way(monkeypatch, divergences, remains) -> None:
    told = iter(divergences)
    monkeypatch.setattr(Guard, "divergence", lambda *_: next(told))
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    scales = Halved(model)
    with trial(model) as tried:
        checks = module._Checks(Guard(Comparison(model, torch.rand(2, 1))), model, 1.0, tried, scales)
        for value, share in ((0.0, 0.05), (1.0, 0.5), (2.0, 1.0)):
            with torch.no_grad():
                model.weight.fill_(value)
            assert checks.passes(share) == (value < 2.0 or math.isfinite(divergences[1]))
            assert float(model.weight.detach()) == value, "what is trained on is not scaled"
    assert float(model.weight.detach()) == remains / 2, "what is kept is scaled"
    assert checks.best == {2.0: divergences[1], 1.0: divergences[0], 0.0: 1.0}[remains]
    assert checks.history == pytest.approx(divergences, nan_ok=True)


def test_without_a_guard_the_decide_images_judge(pair) -> None:
    teacher, model, images, _ = pair
    cal = calibrate(teacher, images)
    before = agreement(teacher, model, cal.decide_views).kl
    record = refine(model, cal, epochs=2, batch_size=16)
    assert record.kept and record.name == "refine" and record.kl_before == pytest.approx(before, rel=1e-6)
    after = agreement(teacher, model, cal.decide_views).kl
    # The record's is of the answers times their scale, this one of the layer that has taken the scale up: float32 rounds both.
    assert record.kl_after == pytest.approx(after, rel=1e-4) and after < before


def test_returns_what_it_was_given_when_training_only_harms(pair) -> None:
    teacher, model, images, held_out = pair
    before = state(model)
    result = refined(teacher, model, images, held_out, epochs=2, batch_size=16, step=30.0)
    assert not result["kept"]
    assert result["kl_after"] == result["kl_before"]
    assert all(not kl < result["kl_before"] for kl in result["history"])
    assert same(state(model), before)


def test_a_known_divergence_is_taken_as_it_is(pair) -> None:
    teacher, model, images, held_out = pair
    before = state(model)
    result = refined(teacher, model, images, held_out, epochs=2, batch_size=16, now=0.0)
    assert not result["kept"] and result["kl_before"] == 0.0 and same(state(model), before)


def test_a_perfect_model_stays_as_it_is(pair) -> None:
    teacher, _, images, held_out = pair
    model = copy.deepcopy(teacher)
    result = refined(teacher, model, images, held_out, epochs=1)
    assert not result["kept"] and result["kl_after"] == result["kl_before"]
    assert same(state(model), state(teacher))


def test_same_seed_same_result_and_global_state_untouched(pair) -> None:
    teacher, model, images, held_out = pair
    first, second, third = (copy.deepcopy(model) for _ in range(3))
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    refined(teacher, first, images, held_out, epochs=3, batch_size=16, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.rand(7)
    refined(teacher, second, images, held_out, epochs=3, batch_size=16, seed=1)
    refined(teacher, third, images, held_out, epochs=3, batch_size=16, seed=2)
    assert same(state(first), state(second))
    assert not same(state(first), state(third))


def test_modes_flags_gradients_runtimes_and_hooks_come_back(pair) -> None:
    dense, model, images, held_out = pair
    cal = calibration_on(dense, images, held_out)
    teacher = cal.original
    model.train()
    model.layer1[0].bn2.eval()
    model.stem.weight.requires_grad_(False)
    mark = torch.ones_like(model.head.weight)
    model.head.weight.grad = mark
    model.layer1[0].conv1.runtime = "factored"
    teacher.layer1[1].train()
    with torch.no_grad():
        result = refine(model, cal, guard=Guard(cal.comparison(held_out)), epochs=3, batch_size=16)
    assert result["kept"]
    assert model.training and not model.layer1[0].bn2.training and model.layer1[1].bn2.training
    assert teacher.layer1[1].training and not teacher.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert model.head.weight.grad is mark and torch.equal(mark, torch.ones_like(mark))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")
    assert all(p.requires_grad for p in teacher.parameters())
    assert model.layer1[0].conv1.runtime == "factored" and model.layer1[1].conv1.runtime == "auto"
    assert not any(m._forward_hooks for net in (teacher, model) for m in net.modules())


def test_an_interruption_leaves_the_best_state_so_far(pair) -> None:
    teacher, model, images, held_out = pair
    before = agreement(teacher, model, held_out).kl

    def stop(name: str, done: int, total: int) -> None:
        if done > 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refined(teacher, model, images, held_out, epochs=12, batch_size=16, progress=stop)
    assert agreement(teacher, model, held_out).kl < before
    assert not any(m._forward_hooks for net in (teacher, model) for m in net.modules())


def test_seconds_bound_the_time(pair, monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_EPOCHS", 10**6)
    teacher, model, images, held_out = pair
    shares: list[int] = []

    def note(name: str, done: int, total: int) -> None:
        shares.append(done)

    result = refined(teacher, model, images, held_out, seconds=1.0, progress=note)
    assert 1.0 <= result["seconds"] < 6
    assert shares == sorted(shares) and shares[-1] == 100
    assert result["epochs"] > 0


def test_small_networks_stop_at_the_most_epochs(pair, monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_EPOCHS", 3)
    teacher, model, images, held_out = pair
    assert refined(teacher, model, images, held_out, seconds=60.0)["epochs"] == 3


def test_network_without_blocks_learns_from_outputs(pair) -> None:
    teacher, model, images, held_out = pair
    result = refined(teacher, model, images, held_out, epochs=6, batch_size=16, blocks=["none.such"])
    assert result["kept"] and result["kl_after"] < result["kl_before"]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"seconds": -1.0}, {"batch_size": 0}])
def test_bad_budgets_are_refused(pair, options) -> None:
    teacher, model, images, held_out = pair
    with pytest.raises(SharefoldError, match=next(iter(options))):
        refined(teacher, model, images, held_out, **options)


def test_no_images_are_refused(pair) -> None:
    teacher, model, images, _ = pair
    with pytest.raises(SharefoldError, match="no images"):
        refine(model, calibrate(teacher, images[:0]), epochs=1)


def draw(images: Tensor, seed: int = 0, **options: float) -> Tensor:
    return random_views(images, torch.Generator().manual_seed(seed), **options)


def test_views_of_no_strength_are_the_images_or_their_mirror_images() -> None:
    images = torch.randn(40, 3, 8, 10)
    plain = draw(images, strength=0, mix=0)
    mirrored = [bool(torch.allclose(v, i.flip(-1), atol=1e-4)) for v, i in zip(plain, images, strict=True)]
    assert all(m or torch.allclose(v, i, atol=1e-4) for m, v, i in zip(mirrored, plain, images, strict=True))
    assert 8 < sum(mirrored) < 32


def test_views_depend_on_the_seed_alone_and_keep_shape_and_type() -> None:
    for channels in (1, 3, 6):
        images = torch.randn(8, channels, 12, 9)
        assert torch.equal(draw(images), draw(images)) and not torch.equal(draw(images), draw(images, 1))
        assert draw(images).shape == images.shape and draw(images).dtype == images.dtype
    assert torch.isfinite(draw(torch.randn(1, 3, 5, 5))).all()


def test_views_move_and_recolour_within_their_limits() -> None:
    column = torch.zeros(300, 3, 41, 41)
    column[:, :, 20, 20] = 1.0
    moved = draw(column, mix=0)
    moved = moved - moved.amin((2, 3), keepdim=True)
    place = moved.sum(1).flatten(1).argmax(1)
    down, across = place // 41 - 20, place % 41 - 20
    reach = 7  # a fifth of half a side is 4 pixels, of a view that may be larger by a third and turned
    assert 2 < int(down.abs().max()) <= reach and 2 < int(across.abs().max()) <= reach
    flat = torch.full((300, 3, 6, 6), 0.7)
    shades = draw(flat, mix=0)[:, :, 3, 3] - 0.7
    assert 0.3 < float(shades.abs().max()) <= 0.4 + 1e-4
    assert float((shades - shades.mean(1, keepdim=True)).abs().max()) <= 0.2  # a flat image has no colour: tint alone


def test_mixed_views_hold_at_most_half_of_another_image() -> None:
    constant = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]).repeat(200, 1, 1, 1)
    mixed = draw(constant, strength=0)[:, 0, 0, 0].reshape(-1, 2)
    assert bool((mixed[:, 0] <= 0.5 + 1e-5).all()) and bool((mixed[:, 1] >= 0.5 - 1e-5).all())
    between = ((mixed > 1e-4) & (mixed < 1 - 1e-4)).float().mean()
    assert 0.15 < float(between) < 0.35  # half are chosen, half of those meet their like


@pytest.mark.parametrize("shape", [(3, 16, 20), (2, 5, 16, 20)])
def test_pasted_views_hold_one_rectangle_of_another_image(shape: tuple[int, ...]) -> None:
    count = 200
    images = torch.arange(float(count)).view(count, *[1] * len(shape)).expand(count, *shape).contiguous()
    views = pasted(images, torch.Generator().manual_seed(0), 0.5)
    assert torch.equal(views, pasted(images, torch.Generator().manual_seed(0), 0.5)) and views.shape == images.shape
    assert torch.equal(views, views[:, :1].expand_as(views))  # in all channels alike
    flat = views[:, 0] if len(shape) == 3 else views[:, 0, 2]
    assert len(shape) == 3 or torch.equal(views[:, 0], flat[:, None].expand_as(views[:, 0]))  # and in all slices
    other = flat != torch.arange(float(count)).view(count, 1, 1)
    assert 70 < int(other.flatten(1).any(1).sum()) < 130
    for index in range(count):
        if bool(other[index].any()):
            rows, columns = other[index].any(1).nonzero().flatten(), other[index].any(0).nonzero().flatten()
            height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
            assert int(other[index].sum()) == height * width and len(flat[index][other[index]].unique()) == 1
            assert 3 <= height <= 13 and 4 <= width <= 16
    assert torch.equal(pasted(images, torch.Generator().manual_seed(0), 0.0), images)


def test_losses_against_their_definitions() -> None:
    logits = torch.randn(6, 5, 3, dtype=torch.float64)
    assert torch.allclose(centred(logits + 7), centred(logits), atol=1e-5) and float(centred(logits).sum(1).abs().max()) < 1e-5
    a, b = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert torch.stack(relative_errors([a, 3 * a], [b, b], [2.0, 3.0])).tolist() == [0.5, 3.0]


def test_blocks_count_for_less_until_outputs_alone_remain(pair) -> None:
    teacher, model, images, _ = pair
    cal = calibration_on(teacher, images, images)
    with lessons(cal, model, images, ("layer1.0", "layer1.1"), ()) as taught:
        start, middle, end = (float(taught.loss(images, done).detach()) for done in (0.0, 0.5, 1.0))
        blocks = sum(float(loss.detach()) for loss in taught.blocks.losses())
        assert taught.relative_error(images) == pytest.approx(start)
    assert blocks > 0 and end > 0
    assert start == pytest.approx(end + blocks / 3, rel=1e-4)  # of one output and two blocks
    assert middle == pytest.approx(end + blocks / 6, rel=1e-4)


def test_a_criterion_of_the_users_does_not_say_how_much_is_wrong(pair) -> None:
    teacher, model, images, _ = pair
    cal = calibrate(teacher, images, criterion=lambda original, found: (original - found).square().mean(1))
    with lessons(cal, model, images, (), ()) as taught:
        assert taught.relative_error(images) is None and module.step_for(taught, images) == module.USUAL_STEP
    with lessons(cal, model, images, ("layer1.0",), ()) as taught:
        assert taught.relative_error(images) == pytest.approx(float(taught.blocks.losses()[0].detach()))


@pytest.mark.parametrize(
    ("wrong", "step"),
    [(None, module.USUAL_STEP), (0.0, module.SHORTEST_STEP), (0.04, 0.2 * module.STEP_OF_ERROR), (9.0, module.LONGEST_STEP)],
)
def test_steps_are_longer_where_more_is_wrong(wrong: float | None, step: float) -> None:
    taught: Any = SimpleNamespace(relative_error=lambda images: wrong)
    assert module.step_for(taught, torch.zeros(1)) == pytest.approx(step)


def test_images_that_are_seen_a_few_times_are_changed_less(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.Clock(images=100, epochs=5, seconds=None).often() == 5 / module.MANY_EPOCHS
    assert module.Clock(images=100, epochs=60, seconds=None).often() == 1
    clock = module.Clock(images=100, epochs=100, seconds=10.0)
    assert clock.often() == 0  # nothing is known yet
    monkeypatch.setattr(clock, "elapsed", lambda: 1.0)  # a tenth of the time
    for seen, expected in ((50, 5), (100, 10), (900, 90)):
        clock.seen = seen
        assert clock.often() == pytest.approx(min(1.0, expected / module.MANY_EPOCHS))
    few = module.Clock(images=100, epochs=4, seconds=10.0)
    monkeypatch.setattr(few, "elapsed", lambda: 1.0)
    few.seen = 900  # no more than the most
    assert few.often() == 4 / module.MANY_EPOCHS


def test_steps_are_smaller_where_time_allows_few(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = module.Clock(images=100, epochs=100, seconds=10.0)
    monkeypatch.setattr(clock, "elapsed", lambda: 1.0)  # a tenth of the time
    for steps, expected in ((1, 10), (25, 250), (100, 1000), (500, 5000)):
        clock.steps = steps
        assert clock.caution() == pytest.approx(min(1.0, expected / module.MANY_STEPS) ** 0.5)
    clock.seen = 90 * 100  # nearly all epochs are done: that says nothing of the time
    assert clock.caution() == 1.0
    assert module.Clock(images=100, epochs=2, seconds=None).caution() == 1.0


@pytest.mark.parametrize("exclude", ["^fc", "bn"])
def test_what_is_excluded_stays_and_the_record_is_of_the_network_that_is_handed_over(exclude: str) -> None:
    torch.manual_seed(0)
    model, x = net(blocks=2), images(300)
    before, cal = copy.deepcopy(model), sharefold.calibrate(model, x)
    plan = sharefold.plan(model, "50%", cal, exclude=exclude)
    done = sharefold.convert_(model, plan, cal, refine=5)
    kept = {name: t for name, t in before.state_dict().items() if re.search(exclude, name)}
    assert kept and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    assert done.steps["refine"].kept or exclude == "bn"  # norms that stay may leave too little to move
    assert cal.decided.divergence(model).mean == pytest.approx(done.steps["refine"].kl_after, rel=1e-4)
