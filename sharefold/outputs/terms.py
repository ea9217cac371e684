"""How far apart two networks' answers are, an output at a time, an image at a time.

Classes: KL(original || other), nats. Yes or no as logits: the same of two outcomes. Everything else: squared error. Each is
compared with what it would cost to give the same answer to every image, the mean one: the variance of numbers (a channel at a
time for a regression), and the information of classes (the entropy of the mean answer less the mean entropy). So outputs of any
scale add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.outputs.leaf import BINARY, BOXES, CLASSES, LABELS, LOGITS, MULTILABEL, REGRESSION, Leaf, rows

# A channel that hardly moves counts as if it had this share of the mean variance of its tensor.
SMALLEST_SHARE = 1e-4
TINY = 1e-12
# Nats: outputs that are as good as the same for all images have nothing to be compared with.
SMALLEST_INFORMATION = 1e-6
_LEAST = torch.finfo(torch.float32).min


class Term(Protocol):
    """The divergence of one output."""

    def per_image(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """(n,) float64 of the original's (n, ...) and another network's, each mean over positions and channels."""


def is_categorical(leaf: Leaf) -> bool:
    """Whether answers are compared as shares of classes rather than as numbers."""
    return leaf.kind in CLASSES or (leaf.kind in (BINARY, MULTILABEL) and not leaf.activated)


def log_shares(leaf: Leaf, tensor: Tensor) -> Tensor:
    """(images, positions, classes) float32 logarithms of the shares of a categorical leaf; two classes for yes or no."""
    if leaf.kind in CLASSES:
        assert leaf.axis is not None
        found = rows(tensor, leaf.axis)
        # A masked class has a logarithm, too: no share times minus infinity would be no number.
        return found.log_softmax(-1).clamp_min(_LEAST) if leaf.kind == LOGITS else found.clamp_min(1e-9).log()
    logits = tensor.float().reshape(len(tensor), -1)
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1).clamp_min(_LEAST)


@dataclass
class Categorical:
    """KL a position, over ``information`` (nats; 1 leaves it in nats)."""

    leaf: Leaf
    information: float = 1.0

    def per_image(self, ours: Tensor, theirs: Tensor) -> Tensor:
        a, b = log_shares(self.leaf, ours), log_shares(self.leaf, theirs)
        positions = F.kl_div(b, a, reduction="none", log_target=True).sum(-1)
        return positions.double().mean(1) / self.information


@dataclass
class Numbers:
    """Squared error over ``variance``: one number, or a channel each."""

    leaf: Leaf
    variance: Tensor

    def per_image(self, ours: Tensor, theirs: Tensor) -> Tensor:
        # The difference in the type of the outputs would lose what half precision has.
        a, b = as_numbers(ours), as_numbers(theirs)
        difference = (a - b).masked_fill(a == b, 0)  # infinities that both say are no numbers to subtract
        return (difference.square() / over_axis(self.variance, difference, self.leaf.axis)).double().flatten(1).mean(1)


@dataclass
class Labels:
    """The share of whole numbers that differ."""

    leaf: Leaf

    def per_image(self, ours: Tensor, theirs: Tensor) -> Tensor:
        return (ours != theirs).double().reshape(len(ours), -1).mean(1)


def as_numbers(tensor: Tensor) -> Tensor:
    """(n, k, ...) float32; complex numbers as pairs, one number an image as (n, 1)."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return (tensor if tensor.ndim > 1 else tensor[:, None]).float()


def over_axis(variance: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """``variance`` (C,) or () in a shape that goes with (n, ...), its channels on ``axis``."""
    variance = variance.to(like.device)
    if variance.ndim == 0 or axis is None:
        return variance
    shape = [1] * like.ndim
    shape[axis] = len(variance)
    return variance.reshape(shape)


class Measuring:
    """Gathers, batch by batch, what a leaf's answers vary by over the images."""

    def __init__(self, leaf: Leaf, nats: bool) -> None:
        self.leaf, self.nats = leaf, nats
        self.count = 0
        self.sum: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.shown: Tensor | int = 0  # answers that are not infinite, as those of masked entries are
        self.entropy = 0.0

    @property
    def varies(self) -> bool:
        """Whether the leaf's divergence depends on how much its answers vary."""
        return self.leaf.kind != LABELS and not self.nats

    def add(self, tensor: Tensor) -> None:
        """Answers (n, ...) of the original."""
        if not self.varies:
            return
        self.count += len(tensor)
        if is_categorical(self.leaf):
            logs = log_shares(self.leaf, tensor)
            shares = logs.exp().double()
            self.entropy += float(torch.special.entr(shares).sum(-1).mean(1).sum())
            # Each channel of yes or no is a question of its own.
            channels, axis = 1, self.leaf.axis
            if self.leaf.kind not in CLASSES and axis is not None:
                channels = tensor.shape[axis]
                order = torch.arange(tensor[0].numel()).reshape(tensor.shape[1:]).movedim(axis - 1, 0)
                shares = shares[:, order.flatten().to(shares.device)]
            self.sum = self.sum + shares.reshape(len(shares), channels, -1, shares.shape[-1]).mean(2).sum(0)
        else:
            values = as_numbers(tensor).double()
            shown = ~values.isinf()
            values, self.shown = values.where(shown, 0), self.shown + shown.sum(0)
            self.sum, self.squares = self.sum + values.sum(0), self.squares + values.square().sum(0)

    def term(self) -> Term:
        """The divergence, once all answers are in."""
        if self.leaf.kind == LABELS:
            return Labels(self.leaf)
        if self.nats:
            return Categorical(self.leaf)
        assert isinstance(self.sum, Tensor)
        if is_categorical(self.leaf):
            mean = self.sum / self.count
            information = float(torch.special.entr(mean).sum(-1).mean()) - self.entropy / self.count
            return Categorical(self.leaf, max(information, SMALLEST_INFORMATION))
        assert isinstance(self.squares, Tensor)
        # Shares, the colours of an image and the numbers of an embedding have one scale; those of a regression need not.
        axis = self.leaf.axis if self.leaf.kind in (REGRESSION, BOXES) else None
        shown = torch.as_tensor(self.shown).clamp_min(1)
        return Numbers(self.leaf, variance_of(self.sum / shown, self.squares / shown, self.count, axis))


def variance_of(mean: Tensor, square: Tensor, count: int, axis: int | None) -> Tensor:
    """Variance over the images, mean over positions, of every channel: (C,), or () without an axis.

    What differs from place to place but not from image to image is no answer. One image alone has only places.

    Args:
        mean, square: means over images of the values and their squares, (k, ...) float64.
        axis: of channels, images being axis 0.
    """
    whole = (square.mean() - mean.mean().square()).clamp_min(0)
    if count > 1:
        each = (square - mean.square()).clamp_min(0) * count / (count - 1)
    else:
        each = whole.expand_as(mean)
    channel = None if axis is None or axis > mean.ndim else axis - 1
    variance = each.mean() if channel is None else each.movedim(channel, 0).reshape(each.shape[channel], -1).mean(1)
    # Rounding leaves a little variance where there is none.
    least = torch.maximum(variance.mean() * SMALLEST_SHARE, square.mean() * TINY).clamp_min(1e-30)
    if float(variance.mean()) <= float(square.mean()) * TINY:  # the same answer to all images: its size is all there is
        least = torch.maximum(least, whole if float(whole) > float(square.mean()) * TINY else square.mean())
    return variance.clamp_min(least).float()
