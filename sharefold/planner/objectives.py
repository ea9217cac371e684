"""What a plan keeps small: how much each layer's relative output error counts against the others'."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem
from sharefold.calibration.statistics import Statistics
from sharefold.errors import unknown
from sharefold.layers import mean_output
from sharefold.outputs import Comparison
from sharefold.solvers.low_rank import max_rank, svd_curve, svd_solve

# (problem of a group, names of its members) -> (K,) factors on the members' relative errors.
Objective = Callable[[GroupProblem, Sequence[str]], Tensor]

# The error that one layer is given to see what it does to the output, and on how many images.
PROBE_ERROR = 0.1
PROBE_IMAGES = 256
# Of damages; factors count relative to each other, and networks of small outputs have small ones throughout.
SMALLEST = 1e-30


def error(statistics: Statistics) -> Objective:
    """The sum of relative data-norm errors: all layers count the same."""
    return lambda problem, names: torch.ones_like(problem.importance)


def fisher(statistics: Statistics) -> Objective:
    """The square root of the divergence that losing a layer's whole output would cost, by second-order estimate.

    The estimate itself (Martens, arXiv:1412.1193) ranks layers well while errors are small and far too sharply when they
    are large; its square root lies half way, in the logarithm, between it and equal weights. Equal weights where the
    output has no gradient. It takes errors and gradients for independent, which they are not in a classifier: there
    :func:`_together` corrects it.
    """
    sensitivity = statistics.sensitivity()

    def factors(problem: GroupProblem, names: Sequence[str]) -> Tensor:
        if any(name not in sensitivity for name in names):
            return torch.ones_like(problem.importance)
        rows = torch.stack([sensitivity[name] for name in names]).to(problem.weights)
        rows = rows * torch.stack([_gain(statistics.model.get_submodule(name), rows[0]) for name in names]).square()
        damage = replace(problem, row_weights=rows).energy / 2
        damage = damage * torch.tensor([_together(statistics, problem.only(k), name) for k, name in enumerate(names)]).to(damage)
        return damage.clamp_min(SMALLEST).sqrt()

    return factors


def _together(statistics: Statistics, problem: GroupProblem, name: str) -> float:
    """What an error of the layer costs over what it would if errors and gradients had nothing to do with each other.

    Half the mean square of their product, image by image, over the sum of products of their mean squares; the error is that of a
    low-rank weight, on images to which nothing was fitted. For layers with one position an image, else 1. EfficientNet-Lite0's
    classifier at rank 300: 5 (KL .143 by second order, .030 by the diagonal; the network's, run: .225).
    """
    form = problem.forms[0]
    if form.groups > 1 or form.features != form.in_channels or form.standardize is not None:
        return 1.0
    found = statistics.vectors().get(name)
    if found is None:
        return 1.0
    inputs, gradients = (t.to(problem.weights) for t in found)
    change = problem.full(approximation(problem, PROBE_ERROR) - problem.weights)[0]
    errors = inputs @ change.T
    if statistics.centered.get(name):
        errors = errors - errors.mean(0)
    apart = (errors.square().mean(0) * gradients.square().mean(0)).sum()
    together = (errors * gradients).sum(1).square().mean()
    return float(together / apart) if bool(apart > 0) and bool(together > 0) else 1.0


def output_kl(statistics: Statistics) -> Objective:
    """The square root of the divergence of the network with an error in this layer alone over that error, by a forward pass
    a layer. As with :func:`fisher`, the ratio itself ranks too sharply.

    Raises:
        SharefoldError: the network returns nothing to compare.
    """
    probe = _Probe(statistics)

    def factors(problem: GroupProblem, names: Sequence[str]) -> Tensor:
        found = [probe(problem.only(k), name) for k, name in enumerate(names)]
        return torch.tensor(found).to(problem.importance).clamp_min(SMALLEST).sqrt()

    return factors


def _gain(layer: nn.Module, like: Tensor) -> Tensor:
    """(O,) what a problem's weights lack of a layer's own: the learned gain of weight-standardised layers, else ones."""
    gain = getattr(layer, "gain", None)
    return torch.ones_like(like) if gain is None else gain.detach().reshape(-1).to(like)


class _Probe:
    """Runs the dense network with one layer's weight at low rank."""

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics
        divergence, images = statistics.divergence, statistics.sample(PROBE_IMAGES)
        self.comparison = Comparison(
            statistics.model, images, divergence.reading, divergence=divergence, batch_size=statistics.batch_size
        )
        self.disturbed = copy.deepcopy(statistics.model)

    def __call__(self, problem: GroupProblem, name: str) -> float:
        """Divergence per unit of relative error."""
        weight = approximation(problem, PROBE_ERROR)
        found = float(problem.errors(weight)[0])
        if found < 1e-9:
            return 0.0
        layer, form = self.disturbed.get_submodule(name), problem.forms[0]
        change = problem.full(weight - problem.weights)[0]
        shift = torch.zeros(form.out_channels, device=change.device)
        if self.statistics.centered.get(name):  # what conversion will let a bias or BatchNorm absorb
            shift = mean_output(change, self.statistics.means[name].to(change))
        scale = _gain(layer, shift)
        kernel = form.native((change * scale[:, None]).reshape(form.weight_shape))
        shift = (shift * scale).view(-1, *[1] * (-1 - form.channel_axis))

        def disturb(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + form.run(inputs[0], kernel.to(inputs[0]), None) - shift.to(output)

        handle = layer.register_forward_hook(disturb)
        try:
            return max(self.comparison.divergence(self.disturbed).mean, 0.0) / found
        finally:
            handle.remove()


def approximation(problem: GroupProblem, wanted: float) -> Tensor:
    """(1, O, N), in the problem's space: the layer's weight at the rank whose relative error is nearest to ``wanted``.

    Layers of few rows (depthwise ones) have no such rank; they get noise of that error.
    """
    flat = problem.flat()
    ranks = range(1, max_rank(flat)) if len(flat.weights) == 1 else []
    if ranks:
        points = svd_curve(flat, list(ranks)[:: max(1, len(ranks) // 64)])
        rank = min(points, key=lambda p: abs(float(p.errors[0]) - wanted)).rank
        return svd_solve(flat, rank).approximation.to(problem.weights)
    noise = torch.randn(problem.weights.shape, generator=torch.Generator().manual_seed(0)).to(problem.weights)
    scale = (wanted / problem.errors(problem.weights + noise)).sqrt()
    return problem.weights + noise * scale[:, None, None]


# "joint" starts from "fisher" and searches on (sharefold/planner/search.py).
JOINT = "joint"
OBJECTIVES: dict[str, Callable[[Statistics], Objective]] = {
    JOINT: fisher, "fisher": fisher, "kl": output_kl, "error": error,
}  # fmt: skip


def objective_named(name: str) -> Callable[[Statistics], Objective]:
    """The objective called ``name``.

    Raises:
        SharefoldError: there is none; names the nearest.
    """
    if name not in OBJECTIVES:
        raise unknown("objective", name, OBJECTIVES)
    return OBJECTIVES[name]
