"""Preconditioned conjugate gradients on matrix-shaped unknowns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearSystem:
    """``apply(X) = rhs`` with a symmetric positive semi-definite map.

    Attributes:
        apply: the linear map; takes and returns a tensor of the shape of ``rhs``.
        rhs: of any shape.
        precondition: an approximate inverse of ``apply`` (symmetric positive definite), or None.
        independent: number of leading dimensions that index separate systems, with their own step lengths.
    """

    apply: LinearMap
    rhs: Tensor
    precondition: LinearMap | None = None
    independent: int = 0


def conjugate_gradient(
    system: LinearSystem, start: Tensor, *, steps: int = 15, tol: float = 1e-8, start_image: Tensor | None = None
) -> Tensor:
    """Solve the system from ``start`` on.

    Every step lowers the quadratic ``<X, apply(X)> / 2 - <X, rhs>``, so stopping early still never does worse than
    ``start``.

    Args:
        steps: most iterations to take.
        tol: stop once the residual norm of every system falls below ``tol`` times its right-hand side.
        start_image: ``apply(start)``, where the caller has it already.

    Returns:
        The solution, shaped like the right-hand side.
    """
    apply, rhs, precondition = system.apply, system.rhs, system.precondition
    dims = tuple(range(system.independent, rhs.dim()))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=dims, keepdim=True)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b, 0.0)  # a direction without curvature or a solved system takes a zero step

    x = start.clone()
    residual = rhs - (apply(x) if start_image is None else start_image)
    target = tol * tol * dot(rhs, rhs)
    z = residual if precondition is None else precondition(residual)
    direction = z.clone()
    rz = dot(residual, z)
    for _ in range(steps):
        if bool((dot(residual, residual) <= target).all()):
            break
        image = apply(direction)
        alpha = ratio(rz, dot(direction, image))
        x += alpha * direction
        residual = residual - alpha * image
        z = residual if precondition is None else precondition(residual)
        rz_next = dot(residual, z)
        direction = z + ratio(rz_next, rz) * direction
        rz = rz_next
    return x
