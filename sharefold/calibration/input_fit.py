"""Do images look to a network like those that it was trained on? Its BatchNorms remember what they saw.

Every BatchNorm holds the mean and variance of its inputs over the training data. Images that are normalised otherwise, whose
channels stand in another order, or that run through another architecture with the same tensors give other ones. Two settings,
or two architectures, are compared on the same images, so that what is peculiar to these images counts for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.input_matching import trained_norms
from sharefold.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sharefold.running import evaluating, evenly, run_on

# Images are judged as a whole and in so many parts: what is better only in some of them is chance.
QUARTERS = 4
FEWEST = 4 * QUARTERS
# A distance has to be so many times another one before anything is said.
CLEAR = 1.5
# How images were normalised shows at once; further on, every layer's own mistakes are added.
FIRST = 2
# Images that settings are compared on: about so many pixels, and at most so many images.
PIXELS, MOST = 48 * 224 * 224, 256
BATCH = 8 * 224 * 224  # pixels a batch
_OVERSHOOT = 0.05  # resizing may leave the range of the pixels a little

Values = tuple[float, ...]


@dataclass(frozen=True)
class Fit:
    """How far what the BatchNorms measure is from what they remember: 0 is the same, 1 nothing alike.

    Attributes:
        whole: of all images.
        quarters: of each quarter of them.
    """

    whole: float
    quarters: Values

    def clearly_better(self, other: Fit, factor: float = CLEAR) -> bool:
        """Nearer by ``factor`` on all images, and nearer on every quarter of them."""
        return self.whole * factor < other.whole and all(a < b for a, b in zip(self.quarters, other.quarters, strict=True))


class _Reached(Exception):
    """Raised at the last BatchNorm that is needed."""


@torch.no_grad()
def fit_of(model: nn.Module, images: Tensor, first: int | None = None) -> Fit | None:
    """The distance of ``images`` from what the BatchNorms of ``model`` remember; None where there is nothing to compare.

    A channel's distance is d / (1 + d), d = (m - mu)^2 / sigma^2 + (s / sigma - 1)^2, of measured mean m and deviation s and
    remembered mu and sigma; a norm's is the mean over its channels, the network's the median over its norms.

    Args:
        model: in any mode; left as it was.
        images: (n, C, H, W), normalised.
        first: only the first so many norms that run.

    Returns:
        None for networks without trained BatchNorms and for fewer than ``FEWEST`` images.
    """
    norms = trained_norms(model)
    if not norms or len(images) < FEWEST:
        return None
    order: list[nn.Module] = []
    with _sums(norms, order, first) as sums, evaluating(model):
        for batch in images.split(max(1, BATCH // (images.shape[-2] * images.shape[-1]))):
            try:
                run_on(model, batch)
            except _Reached:
                continue
            finally:
                sums.end_batch()
    if not order:
        return None
    parts = [torch.arange(len(images)), *torch.arange(len(images)).chunk(QUARTERS)]
    found = [float(torch.stack([sums.distance(norm, part) for norm in order]).quantile(0.5)) for part in parts]
    return Fit(found[0], tuple(found[1:]))


class _Sums:
    """Mean and mean square of every channel of every image at every norm, at its first call a pass."""

    def __init__(self, order: list[nn.Module], first: int | None) -> None:
        self.order, self.first = order, first
        self.found: dict[nn.Module, list[Tensor]] = {}
        self.here: set[nn.Module] = set()

    def note(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if norm in self.here:
            return
        self.here.add(norm)
        if norm not in self.found:
            self.order.append(norm)
        x = inputs[0].float()
        flat = x.reshape(*x.shape[:2], -1)
        self.found.setdefault(norm, []).append(torch.stack([flat.mean(2), flat.square().mean(2)], 1).cpu())
        if self.first is not None and self.first <= len(self.order) and self.here >= set(self.order[: self.first]):
            raise _Reached

    def end_batch(self) -> None:
        self.here.clear()

    def distance(self, norm: nn.Module, part: Tensor) -> Tensor:
        rows = torch.cat(self.found[norm])[part]
        mean, square = rows.mean(0).double()
        spread = (square - mean.square()).clamp_min(0)
        remembered, variance = (cast(Tensor, t).detach().cpu().double() for t in (norm.running_mean, norm.running_var))
        variance = variance + cast(float, norm.eps)
        d = (mean - remembered).square() / variance + ((spread + cast(float, norm.eps)).div(variance).sqrt() - 1).square()
        return (d / (1 + d)).nan_to_num(1.0).mean()


@contextmanager
def _sums(norms: Sequence[nn.Module], order: list[nn.Module], first: int | None) -> Iterator[_Sums]:
    sums = _Sums(order, first)
    handles = [norm.register_forward_pre_hook(sums.note) for norm in norms]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Setting:
    """One way to make a network's input of pixels in 0..1.

    Attributes:
        mean, std: one a channel.
        reverse: channels in reverse order (BGR for RGB).
        raw: what the images are taken for in place of normalised ones: "", or words for the message.
    """

    mean: Values
    std: Values
    reverse: bool = False
    raw: str = ""

    def __str__(self) -> str:
        numbers = (",".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        options = "--mean {} --std {}".format(*numbers)
        words = [self.raw] if self.raw else []
        words += ["channels in reverse order (BGR for RGB)"] if self.reverse else []
        return f"{options}, {' and '.join(words)}" if words else options

    def normalized(self, pixels: Tensor) -> Tensor:
        """(n, C, H, W) in 0..1 as this setting gives them to the network."""
        mean, std = (torch.tensor(values).view(-1, 1, 1).to(pixels) for values in (self.mean, self.std))
        return ((pixels.flip(1) if self.reverse else pixels) - mean) / std


@dataclass(frozen=True)
class Better:
    """A setting that fits clearly better than the one in use, and both distances."""

    setting: Setting
    now: Fit
    then: Fit

    def __str__(self) -> str:
        return (
            f"the images do not look as this network's BatchNorms expect (distance {self.now.whole:.3f} of 1): {self.setting} "
            f"would fit better ({self.then.whole:.3f})"
        )


def known_settings(channels: int, own: Setting | None = None) -> list[Setting]:
    """What networks are commonly trained with, and ``own``; each with channels as they are and in reverse."""
    plain = [((0.5,), (0.5,)), ((0.0,), (1.0,)), ((0.0,), (1 / 255,))]
    colour = [
        (IMAGENET_MEAN, IMAGENET_STD),
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10
        ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),  # CLIP
    ]
    pairs: list[tuple[Values, Values]] = [(mean * channels, std * channels) for mean, std in plain]
    pairs += colour if channels == 3 else []
    if own is not None and (own.mean, own.std) not in pairs:
        pairs.insert(0, (own.mean, own.std))
    return [Setting(mean, std, reverse) for mean, std in pairs for reverse in ((False, True) if channels > 1 else (False,))]


def better_setting(
    model: nn.Module, images: Tensor, mean: Sequence[float], std: Sequence[float], own: Setting | None = None
) -> Better | None:
    """A setting under which ``images`` fit clearly better than as they are; None where there is none or nothing to go by.

    Args:
        model: a network with trained BatchNorms; any other gives None.
        images: (n, C, H, W) as the network is to get them, normalised with ``mean`` and ``std``; a sample of them is run.
        mean, std: one a channel, for pixels in 0..1.
        own: the network's own setting, where the one in use is another.
    """
    images = sample(images)
    now = fit_of(model, images, FIRST)
    if now is None:
        return None
    current = Setting(tuple(mean), tuple(std))
    best: Better | None = None
    for pixels, raw in _pixels(images, current):
        settings = known_settings(images.shape[1], own or current)
        for setting in settings if not raw else [current, *settings]:
            if not raw and setting == current:
                continue
            then = fit_of(model, setting.normalized(pixels), FIRST)
            assert then is not None
            if then.clearly_better(now) and (best is None or then.whole < best.then.whole):
                best = Better(Setting(setting.mean, setting.std, setting.reverse, raw), now, then)
    return best


def sample(images: Tensor) -> Tensor:
    """At most as many images as settings are compared on, evenly spaced."""
    most = sample_size(images.shape[-2], images.shape[-1])
    return images[evenly(len(images), most)]


def sample_size(height: int, width: int) -> int:
    """How many images of this size settings are compared on."""
    return max(FEWEST, min(MOST, PIXELS // (height * width)))


def _pixels(images: Tensor, current: Setting) -> list[tuple[Tensor, str]]:
    """Pixels that ``images`` may have been made of, in 0..1; with words where they would not have been normalised so far."""
    mean, std = (torch.tensor(values).view(-1, 1, 1).to(images) for values in (current.mean, current.std))
    low, high = float(images.min()), float(images.max())
    found = [(images * std + mean, "")]
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        found.append((images, "for images that are in 0..1 now"))
    elif low >= -1 - _OVERSHOOT and high <= 1 + _OVERSHOOT:
        found.append(((images + 1) / 2, "for images that are in -1..1 now"))
    elif low >= 0 and high <= 255:
        found.append((images / 255, "for images that are in 0..255 now"))
    return found


def setting_of(config: dict[str, Any]) -> Setting:
    """Mean and std of a ``pretrained_cfg``."""
    return Setting(tuple(map(float, config["mean"])), tuple(map(float, config["std"])))
