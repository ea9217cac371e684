"""Muon: momentum that is made orthogonal, matrix by matrix, so that all directions of a matrix move alike (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/).

Inputs of a layer are correlated, and so are the gradients of its weights: steps of each number by itself follow the few
directions that the loss feels most. A conversion leaves errors in all the others, of which there are many.

timm has a Muon from later versions on than the oldest that sharefold runs with. It takes the filters of all groups of a
convolution for one matrix, and computes in bfloat16 where a processor does not, which is slow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sharefold.repair.half_precision import native

MOMENTUM = 0.95
# The polynomial that draws singular values towards 1, and how often; from the source above.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
# Matrices whose smaller side is larger than this take longer to make orthogonal than to compute with.
LARGEST = 512


def suits(shape: tuple[int, ...], blocks: int = 1) -> bool:
    """Whether a tensor of this shape, the filters of a convolution of ``blocks`` groups for instance, holds matrices worth it."""
    if len(shape) < 2 or shape[0] % blocks:
        return False
    rows, columns = shape[0] // blocks, 1
    for size in shape[1:]:
        columns *= size
    return 1 < min(rows, columns) <= LARGEST


class Muon(torch.optim.Optimizer):
    """Moves tensors (O, ...), of which rows that meet the same inputs make up a matrix each.

    Args:
        groups: with ``params``, ``lr``, the root mean square of a step, and ``blocks``: how many matrices the rows make up.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0, "blocks": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                matrices = parameter.grad.float().reshape(group["blocks"], len(parameter) // group["blocks"], -1)
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(matrices))
                mean.lerp_(matrices, 1 - MOMENTUM)
                moved = orthogonal(matrices.lerp(mean, MOMENTUM))
                size = moved.square().mean().sqrt().clamp_min(1e-12)
                parameter.sub_((moved / size).reshape(parameter.shape).to(parameter), alpha=group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """(B, m, n) matrices of the same singular vectors, whose singular values are about 1, between .7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-20)
    if native(x.device):
        x = x.bfloat16()  # singular values are near 1 only, whatever the digits
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices)
