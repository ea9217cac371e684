"""Stores a product of two factors in fewer numbers: a square block of one factor is made the identity, which need not be kept.

``W = C B`` and ``W = (C T) (T^-1 B)`` are one matrix for every invertible T, so R^2 of the numbers in C (O x R) and
B (R x N) are a matter of choice. Choose T as R columns of B, and those columns of ``T^-1 B`` are the identity: they need not
be kept. C T are then these columns of W itself, and every other column follows from them: an interpolative decomposition
(Cheng, Gimbutas, Martinsson and Rokhlin, "On the compression of low rank matrices", SIAM J. Sci. Comput. 26, 2005; as a layer:
Zhao et al., "Pivoting Factorization", https://arxiv.org/abs/2501.19090).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sharefold.errors import SharefoldError

# Columns are exchanged until no kept number is larger than this (Goreinov et al., "How to find a good submatrix", 2010).
LARGEST = 1.05
# Exchanges multiply the chosen columns' volume by at least LARGEST each, so few are ever needed.
EXCHANGES = 1000


def pivot(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of ``rows`` that all others follow from, and how.

    Args:
        rows: (R, N) of full rank, R < N.

    Returns:
        ``pivots`` (R,) int64, ascending; ``free`` (R, N - R), the other columns' coordinates, none beyond 1.05 in size
        (unless 1,000 exchanges did not get there); ``mix`` (R, R), with ``rows[:, pivots] = mix`` and
        ``rows[:, others] = mix @ free``. Floats in the dtype of ``rows``; solved in double precision.

    Raises:
        SharefoldError: R >= N, or rows that depend on each other.
    """
    count, size = rows.shape
    if count >= size:
        raise SharefoldError(f"pivot: {count} rows of {size} columns leave nothing to follow: take fewer rows")
    matrix = rows.detach().double()
    _, swaps = torch.linalg.lu_factor(matrix.T)
    order = torch.arange(size, device=rows.device)
    for index, other in enumerate((swaps - 1).tolist()):  # LAPACK's row exchanges, one after another
        order[[index, other]] = order[[other, index]]
    chosen, rest = order[:count], order[count:]
    free, failed = torch.linalg.solve_ex(matrix[:, chosen], matrix[:, rest])
    if bool(failed) or not bool(torch.isfinite(free).all()):
        raise SharefoldError(f"pivot: the {count} rows depend on each other: take fewer rows")
    for _ in range(EXCHANGES):
        index = int(free.abs().argmax())
        row, column = divmod(index, size - count)
        if abs(float(free[row, column])) <= LARGEST:
            break
        free = _exchanged(free, row, column)
        chosen[row], rest[column] = rest[column].clone(), chosen[row].clone()
    chosen, by = chosen.sort()
    rest, across = rest.sort()
    return chosen, free[by][:, across].to(rows), matrix[:, chosen].to(rows)


def _exchanged(free: Tensor, row: int, column: int) -> Tensor:
    """``free`` after chosen column ``row`` and other column ``column`` have changed places."""
    value = free[row, column].clone()
    left, right = free[:, column].clone(), free[row].clone()
    result = free - torch.outer(left, right) / value
    result[row] = right / value
    result[:, column] = -left / value
    result[row, column] = 1 / value
    return result
