"""Fits a small module to another by gradient descent, on random inputs that have the layer's mean and covariance.

Where an activation stands between two factors no linear problem is left to solve. The inputs of a layer are then
stood in for by a Gaussian of the same first two moments, which costs no pass over the images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.state_dicts import trial

STEPS = 200
BATCH = 256
RATE = 0.01


def gaussian(mean: Tensor, covariance: Tensor, count: int, seed: int = 0) -> Tensor:
    """Samples (count, C, 1, 1) with this mean (C,) and covariance (C, C)."""
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean.double().cpu() + noise @ root.T).to(mean)[:, :, None, None]


def descend(
    module: nn.Module, target: nn.Module, samples: Tensor, steps: int = STEPS, rate: float = RATE
) -> tuple[float, float]:
    """Moves the parameters of ``module`` towards ``target``'s outputs on ``samples``; both run in eval mode.

    Returns:
        Mean squared error over the variance of the target, before and after; the start is kept if it was better.
    """
    with torch.no_grad():
        goal = target(samples)
        spread = goal.var().clamp_min(1e-12)
        start = float((module(samples) - goal).square().mean() / spread)
    with trial(module) as tried:
        _descend(module, goal, samples, spread, steps, rate)
        with torch.no_grad():
            end = float((module(samples) - goal).square().mean() / spread)
        if end < start:
            tried.keep()
    return start, end if tried.kept else start


def _descend(module: nn.Module, goal: Tensor, samples: Tensor, spread: Tensor, steps: int, rate: float) -> None:
    parameters = [p.requires_grad_(True) for p in module.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(steps):
            pick = torch.randint(len(samples), (min(len(samples), BATCH),), generator=generator).to(samples.device)
            loss = (module(samples[pick]) - goal[pick]).square().mean() / spread
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
