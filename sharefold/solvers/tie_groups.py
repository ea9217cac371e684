"""One kernel for layers with many conv groups, depthwise ones above all: every row of every group solved at once.

The same optimum as :func:`sharefold.solvers.tie.solve`, group by group, with small direct solves instead of one
iterative solver a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.solvers.data_norm import RIDGE, solve_psd

TINY = 1e-30


def solve(
    weights: Tensor, moments: Tensor, factors: Tensor, scaled: bool, rounds: int = 10, tol: float = 1e-5
) -> tuple[Tensor, Tensor | None]:
    """Minimises ``sum_kgr f_kgr || w_kgr - s_kgr w_gr ||^2`` in the norm of S_kg.

    Args:
        weights: (K, G, R, N), R rows of each of G conv groups of K layers.
        moments: (K, G, N, N).
        factors: (K, G, R), row weights times layer weights.
        scaled: with scales s; otherwise they are 1.

    Returns:
        The kernel (G, R, N), and the scales (K, G, R) or None, in the dtype of ``weights``.
    """
    dtype = weights.dtype
    weights, moments, factors = weights.double(), moments.double(), factors.double()
    floor = RIDGE * moments.diagonal(dim1=2, dim2=3).mean(2).clamp_min(TINY)
    moments = moments + floor[..., None, None] * torch.eye(moments.shape[-1]).to(moments)
    image = weights @ moments
    energy = (factors * (image * weights).sum(3)).sum()
    scales = torch.ones_like(factors)
    kernel = _rows(moments, image, factors, scales)
    if not scaled:
        return kernel.to(dtype), None
    before = float("inf")
    for _ in range(rounds):
        norm = torch.einsum("grn,kgnm,grm->kgr", kernel, moments, kernel)
        scales = torch.where(norm > TINY, (image * kernel).sum(3) / norm.clamp_min(TINY), scales)
        kernel = _rows(moments, image, factors, scales)
        gap = weights - scales.unsqueeze(3) * kernel
        value = float((factors * ((gap @ moments) * gap).sum(3)).sum() / energy.clamp_min(TINY))
        if not value < before * (1 - tol):
            break
        before = value
    # The split between kernel and scales is free; mean scale 1 keeps both at their usual size.
    size = scales.mean(0)
    size = torch.where(size.abs() > 1e-3 * scales.abs().amax(0).clamp_min(TINY), size, torch.ones_like(size))
    return (kernel * size.unsqueeze(2)).to(dtype), (scales / size).to(dtype)


def _rows(moments: Tensor, image: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """The best kernel (G, R, N) for given scales: one N x N system a row."""
    gram = torch.einsum("kgr,kgnm->grnm", factors * scales.square(), moments)
    rhs = ((factors * scales).unsqueeze(3) * image).sum(0)
    return solve_psd(gram, rhs.unsqueeze(3)).squeeze(3)
