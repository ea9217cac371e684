"""The classifier, fitted to the original's logits on the features that the converted network gives it.

A classifier that is shared or factored is part of the sequential refit. One that stays dense is not, and it is right for
features that badly damaged layers no longer give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.measure import evaluating, first_logits, run_on
from sharefold.repair.work import Work
from sharefold.solvers.least_squares import PulledLeastSquares

# Pull towards the original classifier, as a share of the mean variance of its inputs.
RIDGE = 1e-2
BATCH = 200


class Classifier:
    """Least squares for weight and bias of the classifier; the original's logits on the images are the targets."""

    name = "head"

    def refusal(self, work: Work) -> str:
        head = _head(work.model, work.cal.fitting[:2])
        return "" if head is not None else "the logits are not the output of a dense Linear with a bias"

    @torch.no_grad()
    def run(self, work: Work) -> Mapping[str, Any] | None:
        images = work.cal.fitting
        head = _head(work.model, images[:2])
        assert head is not None
        mean_x, mean_y, gram, cross = (value.double() for value in _moments(work.cal.original, work.model, head, images))
        solved = PulledLeastSquares(gram, RIDGE).solve(cross, head.weight.double())
        if solved is None:
            return None
        head.weight.copy_(solved)
        head.bias.copy_(mean_y - solved @ mean_x)
        return {}


def _head(model: nn.Module, images: Tensor) -> nn.Linear | None:
    """The Linear whose output is the network's; found in one run."""
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.bias is not None]
    with ExitStack() as stack:
        runs = [(linear, stack.enter_context(_watched(linear))) for linear in linears]
        stack.enter_context(evaluating(model))
        logits = first_logits(run_on(model, images))
    if logits.ndim != 2:
        return None
    return next((linear for linear, seen in runs if len(seen) == 1 and torch.equal(seen[0][1], logits)), None)


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of every run of ``module``."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    try:
        yield seen
    finally:
        handle.remove()


def _moments(
    original: nn.Module, model: nn.Module, head: nn.Linear, images: Tensor, batch_size: int = BATCH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means (F,) of the features and (O,) of the wanted logits, and centred moments (F, F) and (O, F)."""
    features, wanted = [], []
    with _watched(head) as seen, evaluating(original, model):
        for batch in images.split(batch_size):
            seen.clear()
            run_on(model, batch)
            features.append(seen[0][0].double())
            wanted.append(first_logits(run_on(original, batch)).double())
    x, y = torch.cat(features), torch.cat(wanted)
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    return mean_x, mean_y, x.T @ x / len(x), y.T @ x / len(x)
