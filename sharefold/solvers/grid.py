"""Scales and levels for rounding weights to small integers or codebooks, and packing of the codes into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.errors import SharefoldError

CLIPS = 32


def _levels(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise SharefoldError(f"quantize: {bits} bits: expected 2 to 8")
    return 2 ** (bits - 1) - 1


def _nearest(weights: Tensor, scale: Tensor, top: int) -> Tensor:
    return (weights / scale.unsqueeze(1)).round().clamp(-top, top)


def search_scale(weights: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Row scales (O,) with the least squared rounding error over a grid of clipping points.

    ``importance`` (N,) weights the columns, usually the diagonal of the moments.
    """
    top = _levels(bits)
    peak = weights.abs().amax(dim=1)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    best = torch.full_like(peak, torch.inf)
    scale = peak / top
    # Fewer levels want tighter clipping; below a fifth of the peak no grid gains.
    for clip in torch.linspace(1.0, 0.2, CLIPS).tolist():
        candidate = clip * peak / top
        gap = (weights - candidate.unsqueeze(1) * _nearest(weights, candidate, top)).square()
        error = gap.sum(dim=1) if importance is None else gap @ importance
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, candidate, scale)
    return scale


def kmeans_codebook(
    values: Tensor, bits: int, importance: Tensor | None = None, rounds: int = 50
) -> tuple[Tensor, Tensor]:
    """Scalar k-means: codes (same shape as ``values``, int64) and a sorted codebook of at most ``2 ** bits`` levels.

    Starts at the quantiles; ``importance`` (shape of ``values``) weights the squared errors.
    """
    if not 1 <= bits <= 16:
        raise SharefoldError(f"codebook: {bits} bits: expected 1 to 16")
    flat = values.flatten().to(torch.float64)
    mass = torch.ones_like(flat) if importance is None else importance.flatten().to(torch.float64)
    ordered = flat.sort().values
    count = 2**bits
    picks = ((torch.arange(count, device=flat.device) + 0.5) * (flat.numel() / count)).long()
    codebook = ordered[picks.clamp_max(flat.numel() - 1)].unique()
    codes = torch.zeros_like(flat, dtype=torch.int64)
    previous = torch.inf
    for _ in range(rounds):
        codes = torch.bucketize(flat, (codebook[1:] + codebook[:-1]) / 2)
        total = torch.zeros_like(codebook).index_add_(0, codes, mass)
        sums = torch.zeros_like(codebook).index_add_(0, codes, mass * flat)
        codebook = torch.where(total > 0, sums / total.clamp_min(1e-300), codebook)
        error = float((mass * (flat - codebook[codes]).square()).sum())
        if error >= previous * (1 - 1e-6):
            break
        previous = error
    codes = torch.bucketize(flat, (codebook[1:] + codebook[:-1]) / 2)
    return codes.reshape(values.shape), codebook.to(values.dtype)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integers 0 .. 2^bits - 1 of any shape into a flat uint8 tensor, lowest bit first.

    Raises:
        SharefoldError: bits outside 1 .. 16 or a code out of range.
    """
    if not 1 <= bits <= 16:
        raise SharefoldError(f"pack: {bits} bits: expected 1 to 16")
    flat = codes.flatten().to(torch.int64)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise SharefoldError(f"pack: codes {int(flat.min())} .. {int(flat.max())} do not fit {bits} bits")
    stream = (flat.unsqueeze(1) >> torch.arange(bits, device=flat.device)) & 1
    stream = torch.nn.functional.pad(stream.flatten(), (0, -stream.numel() % 8)).reshape(-1, 8)
    return (stream << torch.arange(8, device=flat.device)).sum(dim=1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` integers (int64, flat) of a tensor made by :func:`pack`.

    Raises:
        SharefoldError: bits outside 1 .. 16 or too few bytes.
    """
    if not 1 <= bits <= 16:
        raise SharefoldError(f"unpack: {bits} bits: expected 1 to 16")
    if packed.numel() * 8 < count * bits:
        raise SharefoldError(f"unpack: {packed.numel()} bytes cannot hold {count} codes of {bits} bits")
    stream = (packed.to(torch.int64).unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1
    stream = stream.flatten()[: count * bits].reshape(count, bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(dim=1)
