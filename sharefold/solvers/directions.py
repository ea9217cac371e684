"""Leading directions of matrices whose inputs have given moments, and orthonormal rows."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_whitened(gram: Tensor, values: Tensor, vectors: Tensor, count: int) -> Tensor:
    """Leading right singular vectors of ``M S^(1/2)``, times ``S^(-1/2)``, in the eigenbasis of S.

    Args:
        gram: (..., N, N), ``M^T M`` of the rows.
        values, vectors: eigenvalues (..., N), all positive, and eigenvectors (..., N, N) of the moments S.
        count: how many.

    Returns:
        (..., N, count), most important first; ``vectors`` times it are the directions, as columns.
    """
    root = values.sqrt()
    inner = root.unsqueeze(-1) * (vectors.transpose(-1, -2) @ gram @ vectors) * root.unsqueeze(-2)
    top = torch.linalg.eigh((inner + inner.transpose(-1, -2)) / 2).eigenvectors.flip(-1)[..., :count]
    return top / root.unsqueeze(-1)


def leading(gram: Tensor, values: Tensor, vectors: Tensor, count: int) -> Tensor:
    """Orthonormal rows (..., count, N) that span the directions of :func:`leading_whitened`."""
    return orthonormal((vectors @ leading_whitened(gram, values, vectors, count)).transpose(-1, -2))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows that span the same, (..., R, N)."""
    return torch.linalg.qr(rows.transpose(-1, -2)).Q.transpose(-1, -2) if rows.shape[-2] else rows
