"""Rounding of a matrix to its grid so that the layer's output, and not the weights, changes least.

The error of every rounded column is passed on to the columns still to come, through the inverse of the input moments
(Optimal Brain Surgeon, as organised by GPTQ, arXiv:2210.17323), with any step per row and any set of levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.solvers.data_norm import eigen_psd, working_dtype
from sharefold.store.tensor_spec import TensorSpec

RIDGE = 1e-3
_BLOCK = 128


def round_matrix(matrix: Tensor, spec: TensorSpec, metric: Tensor | None, ridge: float = RIDGE) -> Tensor:
    """The values (O, N) float32 on the grid of ``spec`` that stand for ``matrix``.

    Args:
        metric: (G, N, N) input moments of every conv group, or None to round to the nearest.
        ridge: added to the moments, relative to their mean diagonal.
    """
    return rounded_from(matrix, spec, metric, ridge)[0]


def rounded_from(matrix: Tensor, spec: TensorSpec, metric: Tensor | None, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """:func:`round_matrix`, and (O, N) float32 what each value was when it was rounded, errors of columns before it included."""
    if metric is None:
        return spec.values(spec.codes(matrix)), matrix.detach().float().cpu()
    groups, columns = metric.shape[0], metric.shape[1]
    scales = spec.row_scales()
    dtype = working_dtype(columns, torch.float32)
    order, upper = error_paths(metric.to(dtype), ridge)
    index = order.unsqueeze(1).expand(groups, matrix.shape[0] // groups, columns)
    work = matrix.detach().cpu().to(dtype).reshape(groups, -1, columns).gather(2, index).clone()
    rounded, before = torch.empty_like(work), torch.empty_like(work)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.empty_like(work[:, :, first:last])
        for j in range(first, last):
            column = before[:, :, j] = work[:, :, j]
            flat = column.reshape(-1, 1)
            rounded[:, :, j] = spec.values(spec.codes(flat, scales), scales).to(dtype).reshape(column.shape)
            error = (column - rounded[:, :, j]) / upper[:, j, j].unsqueeze(1)
            errors[:, :, j - first] = error
            work[:, :, j + 1 : last] -= error.unsqueeze(2) * upper[:, j, j + 1 : last].unsqueeze(1)
        work[:, :, last:] -= errors @ upper[:, first:last, last:]
    values, given = (torch.empty_like(part).scatter_(2, index, part) for part in (rounded, before))
    return values.reshape(matrix.shape).float(), given.reshape(matrix.shape).float()


def error_paths(metric: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Order (G, N) in which columns are rounded, and the upper factor (G, N, N) of the inverse moments in that order.

    Heavy columns go first: their error can still be absorbed by all the others. Row j of the factor holds what column
    j passes on; 1 / diagonal squared is the part of column j that no later column can absorb.
    """
    diagonal = metric.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True)
    groups, columns = order.shape
    rows = order.unsqueeze(2).expand(groups, columns, columns)
    moved = metric.gather(1, rows).gather(2, rows.transpose(1, 2))
    pull = (ridge * diagonal.mean(1)).clamp_min(1e-12)
    moved = moved + torch.diag_embed(pull.unsqueeze(1).expand(groups, columns))
    factor, info = torch.linalg.cholesky_ex(moved)
    if bool(info.any()):
        inverse = torch.stack([(v / e) @ v.T for e, v in (eigen_psd(m) for m in moved)])
    else:
        inverse = torch.cholesky_inverse(factor)
    upper, info = torch.linalg.cholesky_ex((inverse + inverse.transpose(1, 2)) / 2, upper=True)
    if bool(info.any()):  # too ill-conditioned for this precision: no column passes anything on
        upper = torch.diag_embed(moved.diagonal(dim1=1, dim2=2).rsqrt())
    return order, upper


def unabsorbed(metric: Tensor, ridge: float = RIDGE) -> Tensor:
    """(G,) mean over the columns of the squared input that no later column can make up for."""
    _, upper = error_paths(metric.to(working_dtype(metric.shape[1], torch.float32)), ridge)
    return upper.diagonal(dim1=1, dim2=2).square().reciprocal().mean(1)
