"""One divergence of any two networks, and what is learnt and weighed by it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.inputs import Input
from sharefold.outputs.leaf import CLASSES, LABELS, LOGITS, Leaf, rows
from sharefold.outputs.reading import OutputReading, read_outputs
from sharefold.outputs.terms import Categorical, Measuring, Numbers, Term, as_numbers, is_categorical, over_axis
from sharefold.running import evaluating, evenly

# Whose answers show how much outputs vary.
IMAGES = 256
# Logits this far below the largest are no answers: the class has no share in any type of numbers. So networks mask classes.
MASKED = 1e4


class Divergence:
    """The sum over outputs of :mod:`sharefold.outputs.terms`, each times its leaf's weight.

    The only output of a classifier stays in nats: KL(original || other).

    Args:
        reading: of the original.
        answers: its outputs on the images that tell how much they vary, as :meth:`OutputReading.run` gives them, batch by
            batch.

    Raises:
        SharefoldError: no batch.
    """

    def __init__(self, reading: OutputReading, answers: Iterable[Sequence[Tensor]]) -> None:
        self.reading = reading
        nats = reading.classes is not None
        measured = [Measuring(leaf, nats) for leaf in reading.leaves]
        for batch in answers:
            for one, tensor in zip(measured, batch, strict=True):
                one.add(tensor.detach())
        if any(one.count == 0 and one.varies for one in measured):
            raise SharefoldError("outputs: there are no images to compare networks on: give at least one")
        self.terms: list[Term] = [one.term() for one in measured]

    @classmethod
    def of(cls, model: nn.Module, reading: OutputReading, images: Input, batch_size: int = 100) -> Divergence:
        """Measured on what ``model`` says on ``images`` (n, C, H, W), of which some, evenly spaced, are run."""
        if not any(Measuring(leaf, reading.classes is not None).varies for leaf in reading.leaves):
            return cls(reading, [])
        index = evenly(len(images), IMAGES)
        with evaluating(model):
            return cls(reading, (reading.run(model, batch) for batch in images[index].split(batch_size)))

    def each(self, original: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """(leaves, n) float64 on the CPU: every leaf's divergence for every image; infinite where it is not a number.

        Raises:
            SharefoldError: outputs of other shapes.
        """
        found = []
        for leaf, term, a, b in zip(self.reading.leaves, self.terms, original, other, strict=True):
            check_shapes(leaf, a, b)
            found.append(term.per_image(a, b.to(a.device)).cpu().nan_to_num(nan=math.inf, posinf=math.inf))
        return torch.stack(found)

    def total(self, each: Tensor) -> Tensor:
        """(n,) of (leaves, n): the weighted sum."""
        return torch.tensor([leaf.weight for leaf in self.reading.leaves], dtype=torch.float64) @ each

    def spreads(self, teacher: Sequence[Tensor]) -> list[float | Tensor]:
        """What :meth:`losses` puts each leaf's squared error over: (C,) variances of numbers, of all else this batch's."""
        return [self._spread(leaf, term, t) for leaf, term, t in zip(self.reading.leaves, self.terms, teacher, strict=True)]

    def _spread(self, leaf: Leaf, term: Term, teacher: Tensor) -> float | Tensor:
        if isinstance(term, Numbers):
            return term.variance
        if leaf.kind == LOGITS:
            values = centred(teacher, leaf.axis or 1, unmasked(teacher, leaf.axis or 1))
        else:
            shown = teacher.float()[~teacher.isinf()]
            values = shown - shown.mean() if len(shown) else shown.sum()
        return max(float(values.square().mean()), 1e-12)

    def losses(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], spreads: Sequence[float | Tensor] | None = None,
        scaled: Collection[str] = (),
    ) -> list[Tensor]:  # fmt: skip
        """A scalar a differentiable leaf, to learn by: the squared error over the variance, times the leaf's weight.

        Logits less their mean over the classes, which no prediction depends on, over their mean square: a divergence of
        predictions says next to nothing on images that the teacher is certain of. Everything else as it is: images keep
        their brightness.

        Args:
            student, teacher: outputs as :meth:`OutputReading.run` gives them.
            spreads: from :meth:`spreads` of an earlier batch; by default of this one.
            scaled: sources of logits that get their best scale afterwards. They are compared at their best scale in this
                batch: least squares makes logits smaller the less a network can know of new images, larger the better it knows
                those that it learns from.
        """
        found = []
        spreads = self.spreads(teacher) if spreads is None else spreads
        for leaf, spread, s, t in zip(self.reading.leaves, spreads, student, teacher, strict=True):
            check_shapes(leaf, s, t)
            if leaf.kind == LABELS or not s.requires_grad:
                continue
            if leaf.kind == LOGITS:
                shown = unmasked(t, leaf.axis or 1)
                ours, theirs = (centred(logits, leaf.axis or 1, shown) for logits in (s, t))
                loss = error_at_best_scale(ours, theirs) if leaf.source in scaled else F.mse_loss(ours, theirs) / spread
            else:
                hidden = as_numbers(t).isinf()  # there is nothing to learn of masked entries
                difference = (as_numbers(s).masked_fill(hidden, 0) - as_numbers(t).masked_fill(hidden, 0)).square()
                over = over_axis(spread, difference, leaf.axis) if isinstance(spread, Tensor) else spread
                loss = (difference / over).mean()
            found.append(loss if leaf.weight == 1 else leaf.weight * loss)
        return found

    def fisher_seed(self, outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor | None:
        """A random scalar whose squared gradient, halved, is in the mean what a small change of ``outputs`` costs.

        For classes it is the cross-entropy of a label drawn from the network's own answer; for numbers a random projection,
        each over its standard deviation (Martens, https://arxiv.org/abs/1412.1193).

        Args:
            outputs: one tensor (n, ...) a leaf, with gradients.
            generator: on the CPU.

        Returns:
            None where no output has a gradient.
        """
        total: Tensor | None = None
        for leaf, term, tensor in zip(self.reading.leaves, self.terms, outputs, strict=True):
            if leaf.kind == LABELS or not tensor.requires_grad:
                continue
            if isinstance(term, Categorical):
                one = _of_labels(leaf, tensor, generator, term.information)
            else:
                assert isinstance(term, Numbers)
                values = as_numbers(tensor)
                random = torch.randn(values.shape, generator=generator).to(values.device)
                elements = values[0].numel()
                scale = (over_axis(term.variance, values, leaf.axis) * elements / 2).sqrt()
                one = (values * random / scale).sum()
            one = math.sqrt(leaf.weight) * one
            total = one if total is None else total + one
        return total


def _of_labels(leaf: Leaf, tensor: Tensor, generator: torch.Generator, information: float) -> Tensor:
    """Cross-entropy of labels drawn from the answers, summed over images."""
    if is_categorical(leaf) and leaf.kind in CLASSES:
        assert leaf.axis is not None
        found = rows(tensor, leaf.axis)
        positions = found.shape[1]
        logits = found.flatten(0, 1) if leaf.kind == LOGITS else found.flatten(0, 1).clamp_min(1e-9).log()
        chosen = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, chosen.to(logits.device), reduction="sum")
    else:
        logits = tensor.float().reshape(len(tensor), -1)
        positions = logits.shape[1]
        drawn = torch.rand(logits.shape, generator=generator).to(logits.device) < logits.detach().sigmoid()
        loss = F.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="sum")
    return loss / math.sqrt(positions * information)


def divergence_of(model: nn.Module, images: Input, graph: NetworkGraph | None = None, batch_size: int = 100) -> Divergence:
    """The divergence from ``model`` as it is told on ``images`` (n, C, H, W); without terms where nothing can be compared."""
    return Divergence.of(model, read_outputs(model, images, graph), images, batch_size)


def centred(logits: Tensor, axis: int = 1, shown: Tensor | None = None) -> Tensor:
    """Logits (B, ...) less their mean over the classes on ``axis``, which no prediction depends on; float32. Of those that are
    ``shown``, where that is given; the others become 0."""
    if shown is None:
        return logits.float() - logits.float().mean(axis, keepdim=True)
    kept = logits.float().where(shown, 0)
    return (kept - kept.sum(axis, keepdim=True) / shown.sum(axis, keepdim=True)).where(shown, 0)


def unmasked(logits: Tensor, axis: int = 1) -> Tensor | None:
    """Which logits are not those of a masked class; None where all are not. Beside a mask all else would be rounding."""
    shown = ~(logits < logits.amax(axis, keepdim=True) - MASKED)  # what is no number is no mask
    return None if bool(shown.all()) else shown


def error_at_best_scale(values: Tensor, wanted: Tensor) -> Tensor:
    """The least squared error of ``values`` times a number, over the mean square of ``wanted``: one less their squared cosine.

    Where they point away from each other the number would be negative; the error then rises on, to 2.
    """
    cosine = F.cosine_similarity(values.flatten(), wanted.flatten(), dim=0)
    return 1 - cosine * cosine.abs()


def check_shapes(leaf: Leaf, a: Tensor, b: Tensor) -> None:
    """Refuses outputs of two shapes."""
    if a.shape != b.shape:
        shapes = f"{tuple(a.shape)[1:]} an image against {tuple(b.shape)[1:]}"
        raise SharefoldError(f"output {leaf.name} cannot be compared: {shapes}: compare networks of the same outputs")
