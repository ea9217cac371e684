"""What methods have in common that write weights as a product of two factors: ranks, prices, and the option ``pivoted``.

With pivots a factor of rank R keeps R^2 fewer numbers for the same weights: see :mod:`sharefold.solvers.interpolative`.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from bisect import bisect_left
from typing import Any

import torch
from torch import Tensor

from sharefold.layers import ConvForm
from sharefold.methods.contract import LayerMethod, rank_grid
from sharefold.solvers.data_norm import Problem


class TwoFactors(LayerMethod):
    """A method that factors weights. Options: ``rank``, ``pivoted``."""

    option_names = frozenset({"rank", "pivoted"})
    pivoted = True  # whether its candidates are

    def without_pivots(self) -> LayerMethod:
        twin = copy.copy(self)
        twin.pivoted = False
        return twin

    @abstractmethod
    def columns(self, forms: list[ConvForm]) -> int:
        """Columns of the factor that pivots are taken from."""

    def fits(self, forms: list[ConvForm], options: dict[str, Any]) -> bool:
        pivoted = options.get("pivoted", False)
        if not super().fits(forms, options) or not isinstance(pivoted, bool):
            return False
        return not pivoted or options["rank"] < self.columns(forms)

    def options(self, rank: int) -> dict[str, Any]:
        return {"rank": rank, "pivoted": True} if self.pivoted else {"rank": rank}

    def price(self, rank: int, rows: int, columns: int) -> int:
        """Numbers in the factors of a (rows, columns) matrix, with one for the place of every pivot."""
        return rank * (rows + columns - rank + 1 if self.pivoted else rows + columns)

    def ranks(self, rows: int, columns: int, dense: int) -> list[int]:
        """A grid of ranks at which factors hold fewer numbers than ``dense``."""
        full = min(rows, columns) if self.pivoted else columns + 1
        fewer = bisect_left(range(1, full), dense, key=lambda rank: self.price(rank, rows, columns))
        return rank_grid(fewer, points=24)


def per_layer(layers: int, flat: Problem, errors: Tensor) -> Tensor:
    """(K,) layer errors from the (K * G,) errors of conv groups, weighted by their share of the energy."""
    energy = flat.energy.reshape(layers, -1)
    return (errors.reshape_as(energy) * energy).sum(1) / energy.sum(1).clamp_min(1e-30)


def blank_pivots(name: str, rank: int, columns: int) -> dict[str, Tensor]:
    """Tensors of the right shapes for the pivoted factor ``name``, to be filled from a checkpoint."""
    return {name: torch.zeros(rank, columns - rank), "pivots": torch.arange(rank, dtype=torch.int32)}
