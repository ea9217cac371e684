"""Layers of different widths as one problem: every filter of their bank is as wide as the widest, and narrower layers use its
first channels.

Networks whose stages grow from layer to layer (DenseNet, ReXNet) have no two isomorphic layers. A narrow layer is a wide
one whose missing inputs have no weight and no variance and whose missing outputs do not count, so that what solves
isomorphic layers solves these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.calibration.statistics import Statistics
from sharefold.graph import NetworkGraph
from sharefold.layers import ConvForm, checked_form
from sharefold.solvers.data_norm import Problem

# Elements of all layers' padded moments; beyond it layers of different widths are left to themselves.
LARGEST = 1 << 25


@dataclass
class RaggedProblem:
    """K ungrouped layers of one kernel size, (O_k, I_k, h, w), each with its own :class:`GroupProblem`.

    Attributes:
        alone: the problems of the layers, one layer each, none in a space of frames.
    """

    alone: list[GroupProblem]

    @property
    def importance(self) -> Tensor:
        """(K,) factor on each layer's relative error."""
        return torch.cat([problem.importance for problem in self.alone])

    @property
    def forms(self) -> list[ConvForm]:
        return [problem.forms[0] for problem in self.alone]

    def only(self, index: int) -> GroupProblem:
        """The problem of one layer alone."""
        return self.alone[index]

    def flat(self) -> Problem:
        """All layers as wide as the widest: weights (K, O, N), moments (K, N, N), row weights (K, O)."""
        rows = max(form.out_channels for form in self.forms)
        size = max(form.features for form in self.forms)
        energy = torch.cat([problem.energy for problem in self.alone])
        return Problem(
            torch.stack([_padded(p.weights[0], rows, size) for p in self.alone]),
            torch.stack([_padded(p.moments[0, 0], size, size) for p in self.alone]),
            torch.stack([_padded(p.row_weights, 1, rows)[0] for p in self.alone]),
            self.forms[0].kernel_size,
            self.importance / energy.clamp_min(1e-30),
        )


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


def is_ragged(forms: Sequence[ConvForm]) -> bool:
    """Whether the layers differ in their numbers of channels."""
    return len({form.weight_shape for form in forms}) > 1


def problem_for(
    model: nn.Module, graph: NetworkGraph, members: Sequence[str], statistics: Statistics
) -> GroupProblem | RaggedProblem:
    """The tensors of layers of equal or different widths."""
    if is_ragged([checked_form(name, model.get_submodule(name)) for name in members]):
        return RaggedProblem([problem_of(model, graph, [name], statistics) for name in members])
    return problem_of(model, graph, members, statistics)


def can_share(forms: Sequence[ConvForm]) -> bool:
    """Whether one bank can serve these layers: ungrouped, of one kind and kernel size, and not too much for memory."""
    kinds = {(form.kind, form.depth, form.kernel_size, form.standardize) for form in forms}
    largest = max(form.features for form in forms)
    return len(kinds) == 1 and all(form.groups == 1 for form in forms) and len(forms) * largest**2 <= LARGEST
