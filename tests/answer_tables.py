"""Networks that answer with entries of tables, for comparing outputs of any shape and kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.outputs import Leaf, OutputReading

N = 6
IMAGES = torch.arange(float(N)).reshape(N, 1, 1, 1).expand(N, 3, 2, 2)


class Table(nn.Module):
    """Answers image k with entry k of its tables."""

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.tables = nn.ParameterList([nn.Parameter(table, requires_grad=table.is_floating_point()) for table in tables])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        index = x[:, 0, 0, 0].long()
        return tuple(table[index] for table in self.tables)


def reading(*leaves: tuple[str, int | None], activated: bool = False, weights: tuple[float, ...] = ()) -> OutputReading:
    return OutputReading([
        Leaf(str(i), kind, axis, activated=activated, source=str(i), weight=weights[i] if weights else 1.0)
        for i, (kind, axis) in enumerate(leaves)
    ])  # fmt: skip


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed))
