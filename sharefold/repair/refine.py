"""Label-free refinement: the converted network learns to answer as the original does, on the calibration images alone.

The loss (:mod:`sharefold.repair.refine_loss`) is the squared difference of block outputs and of what the network says, on random
views of the images. BatchNorm statistics stay as they are: a few mixed images would only blur those of the training data. What
remains is the state at the end of the schedule: states on the way, where steps are large still, do well on a few hundred decide
images by chance. Decide images only say whether it is better than the state that it was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sharefold.calibration.calibrate import Calibration
from sharefold.data.views import MIX, blended, pasted, random_views
from sharefold.errors import SharefoldError
from sharefold.graph.preserved import buffers_kept
from sharefold.inputs import Input, Inputs
from sharefold.layers import running
from sharefold.layers.norm_fusion import norms_fused
from sharefold.options import RefineOptions, chosen
from sharefold.plans import Plan, Progress
from sharefold.repair.confidence import Confidence
from sharefold.repair.guard import Guard, Scaled
from sharefold.repair.half_precision import depthwise_in_full, take_bfloat16
from sharefold.repair.learned import Learned, Parameters
from sharefold.repair.lockstep import BATCH_ELEMENTS, largest_map
from sharefold.repair.refine_loss import Lessons, lessons
from sharefold.repair.step_record import StepRecord
from sharefold.repair.work import Work
from sharefold.running import batch_within, evaluating
from sharefold.state_dicts import Trial, trial

# Wall-clock budget when neither epochs nor seconds are given: inside of four minutes with start and end included.
DEFAULT_SECONDS = 210.0
# Small networks get through many epochs in that time; beyond this many the images have nothing more to say.
MOST_EPOCHS = 100
WARMUP = 0.1
CHECKS = 5
# Where time allows fewer steps than this, they are smaller: what large ones disturb so few cannot mend.
MANY_STEPS = 1000
# Of images that are seen less often blocks go on counting, and fewer get a rectangle of another one: there is enough to learn.
MANY_EPOCHS = 20
BATCH, SMALLEST_BATCH = 64, 8
# Steps over the root of the relative squared error of blocks and outputs (docs/log.md); where that is not known, the usual one.
STEP_OF_ERROR, SHORTEST_STEP, LONGEST_STEP, USUAL_STEP = 0.016, 0.001, 0.008, 0.004


def refine(
    model: nn.Module, cal: Calibration, options: RefineOptions | None = None, guard: Guard | None = None,
    progress: Progress | None = None, **overrides: Any,
) -> StepRecord:  # fmt: skip
    """Trains all of ``model``'s parameters in place; never leaves it with a higher divergence than it came with.

    Args:
        model: a conversion of the calibrated network. Modes, ``requires_grad`` flags, gradients and runtimes are left as they
            were.
        cal: its network is the teacher; the images of its part ``fit`` are learned from, those that decide are never.
        options: see :class:`sharefold.options.RefineOptions`; its fields may be given by keyword.
        guard: what decides; by default on the calibration's ``decide_views``.
        progress: called with ("refining", parts done, parts) as time or epochs pass.

    Returns:
        The record: divergence before and of the state that remains, and as details ``epochs`` (float, done), ``seconds``
        and ``history``: the divergence at each check, the last one at the end or where outputs were no longer finite.

    Raises:
        SharefoldError: an epoch or time budget that is not positive.
    """
    wanted = chosen(options, overrides, RefineOptions)
    guard = Guard(cal.decided) if guard is None else guard
    return _refined(Work(cal, model, Plan([], 0, 0), guard, cal, progress), wanted)


def _refined(work: Work, wanted: RefineOptions) -> StepRecord:
    wanted = checked(wanted)
    model, guard = work.model, work.guard
    clock, learned = clock_for(work, wanted), Parameters(model, work.protected())
    before, scales = guard.current(model), Confidence(work)
    with trial(model) as tried, closing(training(work, learned, clock, wanted, scales)) as loop:
        checks = _Checks(guard, model, before, tried, scales)
        for share in loop:
            if not checks.passes(share):
                break
    guard.settle(checks.best)
    details = {"epochs": clock.epochs(), "seconds": clock.elapsed(), "history": checks.history}
    return StepRecord("refine", tried.kept, "", before, checks.best, clock.elapsed(), details, guard.images)


class Refinement:
    """:func:`refine` as a step of a conversion; it judges itself, by states on the way where it is cut short."""

    name = "refine"

    def __init__(self, options: RefineOptions) -> None:
        self.options = options

    def refusal(self, work: Work) -> str:
        return ""

    def run(self, work: Work) -> StepRecord:
        return _refined(work, self.options)


def checked(options: RefineOptions) -> RefineOptions:
    """With the default where neither epochs nor seconds are given.

    Raises:
        SharefoldError: an epoch or time budget, or a batch, that is not positive.
    """
    for name in ("epochs", "seconds", "batch_size"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise SharefoldError(f"refine: {name}={value}: must be above 0")
    return replace(options, seconds=DEFAULT_SECONDS) if options.epochs is None and options.seconds is None else options


def clock_for(work: Work, wanted: RefineOptions) -> Clock:
    return Clock(len(work.cal.fit_images), MOST_EPOCHS if wanted.epochs is None else wanted.epochs, wanted.seconds)


class Clock:
    """How much of the budget is used: the larger share of epochs and seconds."""

    def __init__(self, images: int, epochs: int, seconds: float | None) -> None:
        self.images, self.most, self.seconds = images, epochs, seconds
        self.seen = self.steps = 0
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def epochs(self) -> float:
        return self.seen / self.images

    def share(self) -> float:
        spent = 0.0 if self.seconds is None else self.elapsed() / self.seconds
        return min(1.0, max(self.epochs() / self.most, spent))

    def often(self) -> float:
        """How often every image will be seen, as far as can be told by now, as a share of ``MANY_EPOCHS``; at most 1."""
        expected = float(self.most)
        if self.seconds is not None:
            expected = min(expected, self.epochs() * self.seconds / max(self.elapsed(), 1e-9))
        return min(1.0, expected / MANY_EPOCHS)

    def caution(self) -> float:
        """Factor on the size of a step, by how many the time allows as far as can be told by now; 1 where nothing limits it."""
        if self.seconds is None:
            return 1.0
        spent = max(self.elapsed() / self.seconds, 1 / MANY_STEPS)
        return math.sqrt(min(1.0, max(self.steps, 1) / spent / MANY_STEPS))


class _Checks:
    """Keeps the state at the end if its divergence is below that before training, else the state before.

    Of a run that is cut short, or whose outputs are no longer finite, the best state that was checked remains. Every state is
    compared, and kept, at its best scale of the logits, the one before training as it is: least squares alone makes logits
    smaller the less a network can know.
    """

    def __init__(self, guard: Guard, model: nn.Module, before: float, tried: Trial, scales: Scaled) -> None:
        self.guard, self.model, self.tried, self.scales = guard, model, tried, scales
        self.before = self.best = before
        self.history: list[float] = []
        self._next = 1 / CHECKS

    def passes(self, share: float) -> bool:
        """Checks the model now and then and at the end; False when its outputs are no longer finite."""
        if share < self._next:
            return True
        self._next = min(1.0, share + 1 / CHECKS)
        self.scales.settle()
        found = self.guard.settled(self.model, self.scales)
        self.history.append(found)
        if share >= 1 and math.isfinite(found):
            self.best = self.before
            self.tried.drop()
        if self.guard.better(found, self.best):
            self.best = found
            self.tried.keep(going_on=True)
        self.scales.undo()
        return math.isfinite(found)


def training(
    work: Work, learned: Learned, clock: Clock, options: RefineOptions, scales: Confidence
) -> Generator[float, None, None]:
    """Trains ``learned``, and yields the share of the budget used after every step; the last one is 1.

    Between steps the network is as it trains: in eval mode, its norms inside of its convolutions.
    """
    cal, model = work.cal, work.model
    original, images = cal.original, cal.fit_images
    generator = torch.Generator().manual_seed(options.seed)
    device = next(model.parameters()).device
    batch_size, blocks = options.batch_size, tuple(cal.graph.blocks) if options.blocks is None else options.blocks
    if batch_size is None:
        largest = largest_map(original, images[:1].to(device))
        batch_size = batch_within(BATCH_ELEMENTS, largest, BATCH, SMALLEST_BATCH)
    first = images[: max(2, batch_size)].to(device)
    # Gradients of fewer images are noisier, by the square root, and so must steps be smaller.
    fewer = math.sqrt(min(1.0, min(batch_size, len(images)) / BATCH))
    share = 0.0
    with (
        _training(original, model), norms_fused(original, cal.norms, constant=True), norms_fused(model, cal.norms),
        lessons(cal, model, first, blocks, scales.layers) as taught, depthwise_in_full(model),
    ):  # fmt: skip
        step = step_for(taught, first) if options.step is None else options.step
        optimizers = learned.optimizers(step * fewer)
        rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
        take_bfloat16(taught, first)
        while True:
            order = torch.randperm(len(images), generator=generator)
            for index in order.split(batch_size):
                caution = clock.caution()
                for group, rate in rates:
                    group["lr"] = rate * _rate(share) * caution
                picked = images[index]
                often = clock.often()
                views = _views(picked, cal, learned.paste * often, generator)
                loss = taught.loss(views.to(device), share * often)
                model.zero_grad()
                loss.backward()
                learned.take_gradients()
                for optimizer in optimizers:
                    optimizer.step()
                learned.show()
                clock.seen += len(index)
                clock.steps += 1
                share = clock.share()
                if work.progress:
                    work.progress("refining", round(share * 100), 100)
                yield share
                if share >= 1:
                    return
            learned.epoch_ends()


def _views(images: Input, cal: Calibration, paste: float, generator: torch.Generator) -> Input:
    """Random views where it is known what axes mean. What is turned in one of several inputs would no longer belong to the
    others; anything else may at least be mixed."""
    if isinstance(images, Inputs):
        return images
    if not cal.has_views:
        return blended(images, generator, MIX)
    return pasted(random_views(images, generator, mirror=cal.mirrors), generator, paste)


def step_for(taught: Lessons, images: Input) -> float:
    """The largest relative change of a tensor at once: the more is to be mended, the farther may a step go, and what is nearly
    right would only be disturbed by long ones."""
    wrong = taught.relative_error(images)
    return USUAL_STEP if wrong is None else min(max(STEP_OF_ERROR * math.sqrt(wrong), SHORTEST_STEP), LONGEST_STEP)


def _rate(share: float) -> float:
    """Linear warm-up, then a cosine to 0."""
    if share < WARMUP:
        return max(share, WARMUP / 20) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))


@contextmanager
def _training(original: nn.Module, model: nn.Module) -> Iterator[None]:
    """Both networks in eval mode, gradients on for all of ``model``'s parameters; all of it is undone at the end."""
    flags = [(p, p.requires_grad, p.grad) for net in (original, model) for p in net.parameters()]
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter in original.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.grad = None
        # A composed weight is small beside the maps, and one convolution a layer passes over memory once.
        with evaluating(original, model), buffers_kept(original, model), torch.enable_grad(), running(model, "composed"):
            yield
    finally:
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
