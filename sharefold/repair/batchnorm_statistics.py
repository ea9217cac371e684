"""BatchNorm statistics of the converted network, re-estimated on the images that layers are fitted to.

That rescues a badly damaged network and harms a lightly damaged one: the guard decides, and a part of the way may be the best.
What a layer loses makes its outputs smaller, so that the old statistics understate what is left; but the new ones are noisy, and
take what is lost for granted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sharefold.repair.partial import Partial
from sharefold.repair.work import Work
from sharefold.running import batch_of, evaluating, run_on

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Images of a batch: its own variance is what counts, and of too few it is noise.
MOST, LEAST = 200, 16
# The way from the old statistics to the new ones is gone whole, or by these parts of it.
PARTS = 4


class NormStatistics:
    """Moves running means and variances to those of the images; where that does harm, a part of the way."""

    name = "norms"

    def refusal(self, work: Work) -> str:
        if not _norms(work):
            return "the network has no BatchNorm with running statistics"
        return "" if len(work.cal.fit_images) > 1 else "one image alone has no variance to tell"

    @torch.no_grad()
    def run(self, work: Work) -> Partial:
        found, images = {norm: _Pooled() for norm in _norms(work)}, work.cal.fit_images
        kept = [(buffer, buffer.clone()) for norm in found for buffer in norm.buffers(recurse=False)]
        handles = [norm.register_forward_pre_hook(pooled.hook) for norm, pooled in found.items()]
        try:
            with evaluating(work.model):
                for norm in found:
                    norm.train()  # what is behind it gets inputs as the new statistics will make them
                for batch in images.split(_sizes(len(images), batch_of(images, MOST, LEAST))):
                    run_on(work.model, batch)
        finally:
            for handle in handles:
                handle.remove()
            for buffer, value in kept:
                buffer.copy_(value)
        # The others do not run in eval mode: those of auxiliary heads, and those that their layer composes with its filters.
        norms = [norm for norm, pooled in found.items() if pooled.count > 1]
        old = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        new = [(found[norm].mean, found[norm].variance) for norm in norms]

        @torch.no_grad()
        def keep(parts: int) -> None:
            for norm, before, after in zip(norms, old, new, strict=True):
                for place, first, last in zip((norm.running_mean, norm.running_var), before, after, strict=True):
                    last = last.to(first)
                    place.copy_(last if parts == PARTS else first.lerp(last, parts / PARTS))

        keep(PARTS)
        return Partial(PARTS, keep, lambda parts: {"step": parts / PARTS})


class _Pooled:
    """Mean and variance (C,) of a norm's inputs over all batches together, in float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.squares = torch.zeros((), dtype=torch.float64)  # squares of differences from the mean, added up

    def hook(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].detach().float()
        axes = [0, *range(2, values.ndim)]
        variance, mean = (part.cpu().double() for part in torch.var_mean(values, axes, correction=0))
        count = values.numel() // values.shape[1]
        share = count / (self.count + count)
        self.squares = self.squares + count * variance + (self.count * share) * (mean - self.mean).square()
        self.mean = self.mean + (mean - self.mean) * share
        self.count += count

    @property
    def variance(self) -> Tensor:
        """Unbiased, as running variances are."""
        return self.squares / (self.count - 1)


def _sizes(count: int, most: int) -> list[int]:
    """Sizes of batches of about ``most`` images, as equal as can be: a short last one would be normalised by next to nothing."""
    parts = min(-(-count // most), max(1, count // LEAST))
    return [count // parts + (part < count % parts) for part in range(parts)]


def _norms(work: Work) -> list[Any]:
    named = work.model.named_modules()
    return [m for name, m in named if isinstance(m, NORMS) and m.running_mean is not None and not work.plan.protects(name)]
