"""How sure a converted network is: its logits, times one number.

What a layer loses it loses of its outputs' variance, and least squares on damaged inputs give answers nearer to the mean still:
layer by layer the signal shrinks, and at the end the network says the same as the original, half as surely. That hides from a
divergence what a repair has brought. So each state of a network is compared at its own best scale of the logits, which the layer
in front of them takes up (temperature scaling: Guo et al., https://arxiv.org/abs/1706.04599, here against the original instead of
labels).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.layers import STOCK_LAYERS, SharedConv
from sharefold.outputs import Comparison
from sharefold.outputs.divergence import MASKED
from sharefold.outputs.leaf import LOGITS
from sharefold.repair.output_layers import output_layers
from sharefold.repair.work import Work
from sharefold.running import evaluating, evenly

# The scale is sought between one over this and this.
WIDEST = 64.0
# Numbers of an output that are looked at; of maps for segmentation the first images alone, or some positions of these.
ENTRIES = 1 << 25
# Images on which scaled logits are compared with what was expected of them, and by how much they may differ.
FEW, SAME = 8, 1e-3


class Confidence:
    """The scale of one network's logits: a repair of its own, and what every state that a repair leaves is settled by.

    Attributes:
        layers: that give the logits, by the name of the output: dense ones or shared ones with coefficients, free to change and
            used once.
        divergence: of the network as it was settled last, where its answers told it; None after :meth:`undo`.
    """

    name = "scale"

    def __init__(self, work: Work) -> None:
        self.model, self.comparison = work.model, work.guard.comparison
        self.layers = _layers(work)
        self.divergence: float | None = None
        self._exact: bool | None = None  # whether the network's answers follow the layer's, as far as that was tried
        self._before: list[tuple[Tensor, Tensor]] = []

    def refusal(self, work: Work) -> str:
        return "" if self.layers else "no logits are the output of a layer that can be scaled"

    def run(self, work: Work) -> Mapping[str, Any]:
        return {"factors": {name: round(factor, 4) for name, factor in self.settle().items()}}

    @torch.no_grad()
    def settle(self) -> dict[str, float]:
        """Gives the logits the scale of least divergence; the factors, by the name of the output."""
        self.divergence = None
        self._before = [(p, p.detach().clone()) for layer in self.layers.values() for p in layer.parameters(recurse=False)]
        if not self.layers:
            return {}
        factors, answers = _best_factors(self.comparison, self.model, list(self.layers))
        for name, factor in factors.items():
            _scale(self.layers[name], factor)
        factor = next(iter(factors.values()), 1.0)
        if answers is not None and (factor == 1.0 or self._follow(answers[0][1][0], factor)):
            self.divergence = self.comparison.of_answers((theirs, [factor * ours[0]]) for theirs, ours in answers).mean
        return factors

    def _follow(self, before: Tensor, factor: float) -> bool:
        """Whether the answers are those before the scaling times the factor: a network may change its logits in place."""
        if self._exact is None:
            images = self.comparison.batches[0][:FEW]
            with evaluating(self.model):
                (now,) = self.comparison.reading.run(self.model, images)
            wanted = factor * before[: len(images)].float()
            self._exact = torch.allclose(now.float(), wanted, rtol=SAME, atol=SAME * float(wanted.abs().amax()))
        return self._exact

    @torch.no_grad()
    def undo(self) -> None:
        """Takes the last scaling back."""
        for tensor, value in self._before:
            tensor.copy_(value)
        self._before, self.divergence = [], None


def _layers(work: Work) -> dict[str, nn.Module]:
    reading = work.cal.reading
    # A tensor that holds boxes, too, or logits of several questions, has no scale of its own.
    logits = {leaf.source for leaf in reading.leaves if leaf.kind == LOGITS and leaf.channels is None}
    if work.guard.comparison.criterion is not None or not logits:
        return {}
    images = work.cal.images[work.cal.parts.fit[:2]]
    names = {id(module): name for name, module in work.model.named_modules()}
    owners = Counter(id(p) for module in work.model.modules() for p in module.parameters(recurse=False))
    return {
        source: layer for source, layer in output_layers(reading, work.model, images, _scalable).items()
        if source in logits and not work.plan.protects(names[id(layer)])
        and all(owners[id(p)] == 1 for p in layer.parameters(recurse=False))
    }  # fmt: skip


def _scalable(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    if not own or not all(p.requires_grad and p.is_floating_point() for p in own):
        return False
    stock = type(module) in STOCK_LAYERS
    return stock or (isinstance(module, SharedConv) and module.linear_part() is not None)


def _scale(layer: Any, factor: float) -> None:
    if isinstance(layer, SharedConv):
        part = layer.linear_part()
        assert part is not None
        layer.set_linear_part(part[1] * factor)
        if layer.own_bias is not None:
            layer.own_bias.mul_(factor)
    else:
        for parameter in layer.parameters(recurse=False):
            parameter.mul_(factor)


def _best_factors(
    comparison: Comparison, model: nn.Module, names: list[str]
) -> tuple[dict[str, float], list[tuple[list[Tensor], list[Tensor]]] | None]:  # fmt: skip
    """The best factor of every output, by name; and what both networks said, if there is one output and it was seen whole."""
    answers: list[tuple[list[Tensor], list[Tensor]]] | None = [] if len(comparison.reading.leaves) == 1 else None
    leaves = {leaf.source: (index, leaf.axis) for index, leaf in enumerate(comparison.reading.leaves)}
    gathered: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    room = dict.fromkeys(names, ENTRIES)
    for theirs, ours in comparison.answers(model):
        for name in names:
            index, axis = leaves[name]
            a, b = theirs[index], ours[index]
            if a.shape != b.shape or axis is None:
                answers = None
                continue
            if answers is not None:
                answers.append((theirs, ours))
            pair = [tensor.float().movedim(axis, -1).flatten(0, -2) for tensor in (a, b)]
            fit = room[name] // a.shape[axis]
            if len(pair[0]) > fit:  # a batch of large maps alone may be more
                answers, chosen = None, evenly(len(pair[0]), fit).to(a.device)
                pair = [tensor[chosen] for tensor in pair]
            if fit:
                room[name] -= pair[0].numel()
                gathered[name].append((pair[0], pair[1]))
    found = {}
    for name, pairs in gathered.items():
        factor = _best_factor(*(torch.cat(part) for part in zip(*pairs, strict=True))) if pairs else None
        if factor is not None:
            found[name] = factor
    return found, answers


def _best_factor(wanted: Tensor, given: Tensor) -> float | None:
    """The number that minimises the mean KL(softmax(wanted) || softmax(factor * given)), rows (n, classes); None without one."""
    wanted, given = (logits.masked_fill(wanted == -math.inf, -MASKED) for logits in (wanted, given))
    if not bool(torch.isfinite(wanted).all() and torch.isfinite(given).all()):
        return None
    # A constant a row changes no share; without it, sums of sure rows are not differences of large numbers.
    given = given - given.amax(1, keepdim=True)
    along = float((wanted.softmax(1) * given).sum(1).double().mean())

    def slope(logarithm: float) -> float:
        """Of the divergence, by the factor: it rises with the factor, and its root is known to many more digits than the lowest
        point of the divergence itself, which rounding hides."""
        return float(((math.exp(logarithm) * given).softmax(1) * given).sum(1).double().mean()) - along

    limit = math.log(WIDEST)
    least, most = slope(-limit), slope(limit)
    if most - least <= 1e-6 * float(given.abs().mean()):
        return None  # no row differs from class to class
    if least >= 0 or most <= 0:
        return 1 / WIDEST if least >= 0 else WIDEST
    from scipy.optimize import brentq  # a quarter of a second, for those who get here

    return math.exp(brentq(slope, -limit, limit, xtol=1e-9))
