"""The classifier, fitted to the original's logits on the features that the converted network gives it.

A classifier that is shared or factored is part of the sequential refit. One that stays dense is not, and it is right for
features that badly damaged layers no longer give.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.measure import agreement, evaluating, first_logits, run_on

# Pull towards the original classifier, as a share of the mean variance of its inputs.
RIDGE = 1e-2


@torch.no_grad()
def refit_head(
    original: nn.Module, model: nn.Module, images: Tensor, held_out: Tensor, ridge: float = RIDGE, batch_size: int = 200,
    before: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Least squares for weight and bias of ``model``'s classifier, if KL(original || model) on ``held_out`` falls.

    Args:
        images: (n, C, H, W), normalised; the original's logits on them are the targets.
        held_out: (m, C, H, W), which decide.
        ridge: pull towards the weight as it is.
        before: KL of ``model`` as it is, nats, where that is known already.

    Returns:
        {"kept": bool, "kl_before": float, "kl_after": float}; {"kept": False} where the logits are not the output of a dense
        Linear with a bias.
    """
    head = _head(model, images[:2])
    if head is None:
        return {"kept": False}
    before = agreement(original, model, held_out).kl if before is None else before
    weight, bias = head.weight, head.bias
    saved = weight.clone(), bias.clone()
    mean_x, mean_y, gram, cross = (value.double() for value in _moments(original, model, head, images, batch_size))
    rho = ridge * gram.diagonal().mean().clamp_min(1e-12)
    normal = gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    solved, failed = torch.linalg.solve_ex(normal, (cross + rho * weight.double()).T)
    if bool(failed) or not bool(torch.isfinite(solved).all()):
        return {"kept": False}
    weight.copy_(solved.T)
    bias.copy_(mean_y - solved.T @ mean_x)
    after = agreement(original, model, held_out).kl
    kept = after < before
    if not kept:
        weight.copy_(saved[0])
        bias.copy_(saved[1])
    return {"kept": kept, "kl_before": before, "kl_after": after}


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
    original: nn.Module, model: nn.Module, head: nn.Linear, images: Tensor, batch_size: int
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
