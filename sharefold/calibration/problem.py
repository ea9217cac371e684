"""A group of layers as tensors: weights, input moments and the scale of each output row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.layers import ConvForm, affine, form_of, target_weight
from sharefold.solvers.data_norm import Problem


@dataclass
class GroupProblem:
    """K isomorphic layers under the data norm (algorithms: relative output error on the calibration inputs).

    Attributes:
        forms: the K forms; all have the same weight shape.
        weights: (K, O, N) effective weights, N = I/groups * h * w.
        moments: (K, G, N, N) input second moments of every conv group (G = groups).
        row_weights: (K, O) squared scale of every output row, from the norm behind the layer.
        importance: (K,) factor on each layer's relative error in the objective; ones by default.
        frames: (K, N', N), or None: orthonormal rows that span every layer's weight. ``weights`` and ``moments`` are then
            in this space of N < N' dimensions (``Statistics.frames``).
    """

    forms: list[ConvForm]
    weights: Tensor
    moments: Tensor
    row_weights: Tensor
    importance: Tensor
    frames: Tensor | None = None

    def full(self, matrices: Tensor) -> Tensor:
        """Matrices (K, R, N) of the problem's space on the layer's own features, (K, R, I/groups * h * w)."""
        return matrices if self.frames is None else matrices @ self.frames.to(matrices).transpose(1, 2)

    @property
    def energy(self) -> Tensor:
        """(K,) squared norm of every layer's scaled output."""
        return self._squared(self.weights)

    def errors(self, approximation: Tensor) -> Tensor:
        """(K,) relative data-norm errors of ``approximation`` (K, O, N)."""
        return self._squared(self.weights - approximation) / self.energy.clamp_min(1e-30)

    def _squared(self, matrices: Tensor) -> Tensor:
        k, groups = self.moments.shape[:2]
        blocks = matrices.reshape(k, groups, -1, matrices.shape[-1])
        rows = torch.einsum("kgon,kgnm,kgom->kgo", blocks, self.moments, blocks)
        return (rows.reshape(k, -1) * self.row_weights).sum(1)

    @property
    def layer_weights(self) -> Tensor:
        """(K,) weight of each layer's absolute error, so that the objective adds relative errors."""
        return self.importance / self.energy.clamp_min(1e-30)

    def flat(self) -> Problem:
        """Every (layer, conv group) as one entry: for methods that share across conv groups too."""
        k, o, n = self.weights.shape
        groups = self.moments.shape[1]
        return Problem(
            self.weights.reshape(k * groups, o // groups, n),
            self.moments.reshape(k * groups, n, n),
            self.row_weights.reshape(k * groups, o // groups),
            self._kernel,
            self.layer_weights.repeat_interleave(groups),
        )

    def conv_group(self, index: int) -> Problem:
        """Conv group ``index`` of every layer: for methods that keep conv groups apart."""
        k, o, n = self.weights.shape
        groups = self.moments.shape[1]
        weights = self.weights.reshape(k, groups, o // groups, n)[:, index]
        rows = self.row_weights.reshape(k, groups, o // groups)[:, index]
        return Problem(weights, self.moments[:, index], rows, self._kernel, self.layer_weights)

    @property
    def _kernel(self) -> tuple[int, int]:
        return self.forms[0].kernel_size if self.frames is None else (1, 1)

    def only(self, index: int) -> GroupProblem:
        """The problem of one layer alone."""
        pick = slice(index, index + 1)
        return GroupProblem(
            self.forms[pick], self.weights[pick], self.moments[pick], self.row_weights[pick], self.importance[pick],
            None if self.frames is None else self.frames[pick],
        )  # fmt: skip


def row_scale(layer: nn.Module, norm: nn.Module | None) -> Tensor:
    """(O,) factor between the layer's output and what the network sees behind its BatchNorm and gain."""
    form = form_of(layer)
    assert form is not None
    weight = layer.weight
    scale = torch.ones(form.out_channels, dtype=torch.float32, device=weight.device)  # type: ignore[arg-type]
    gain = getattr(layer, "gain", None)
    if gain is not None:
        scale = scale * gain.detach().reshape(-1).float().abs()  # type: ignore[union-attr]
    variance = getattr(norm, "running_var", None)
    if variance is not None and variance.numel() == form.out_channels:
        scale = scale * affine(norm)[0].detach().float().abs()
    return scale


def group_problem(
    model: nn.Module, members: Sequence[str], norms: Sequence[str | None], moments: Sequence[Tensor],
    importance: Tensor | None = None, frames: Sequence[Tensor] = (),
) -> GroupProblem:  # fmt: skip
    """Builds the problem of the layers ``members``; ``moments[k]`` is (G, N, N), ``frames[k]`` (N', N) or none are given."""
    layers = [model.get_submodule(name) for name in members]
    forms = []
    for layer in layers:
        form = form_of(layer)
        assert form is not None
        forms.append(form)
    weights = torch.stack([target_weight(layer, form) for layer, form in zip(layers, forms, strict=True)]).float()
    frame = torch.stack(list(frames)).to(weights) if frames else None
    if frame is not None:
        weights = weights @ frame
    rows = torch.stack(
        [
            row_scale(layer, None if norm is None else model.get_submodule(norm))
            for layer, norm in zip(layers, norms, strict=True)
        ]
    )
    # A dead row (gamma 0) still needs a defined solution: it gets a hundredth of the typical weight.
    rows = rows.square()
    rows = torch.maximum(rows, 1e-4 * rows.mean(1, keepdim=True)).clamp_min(1e-20)
    for name, moment in zip(members, moments, strict=True):
        if moment.shape[-1] != weights.shape[-1]:
            raise SharefoldError(f"layer {name} has {forms[0].features:,} inputs an output, too many for this method: exclude it")
    if importance is None:
        importance = torch.ones(len(layers), device=weights.device)
    return GroupProblem(
        forms, weights, torch.stack(list(moments)).to(weights), rows.to(weights), importance.to(weights), frame
    )


def problem_of(
    model: nn.Module, graph: NetworkGraph, members: Sequence[str], statistics: Statistics
) -> GroupProblem:
    """The tensors of a group."""
    norms = [graph.layers[name].norm for name in members]
    moments = statistics.moments(members)
    frames = [statistics.frames[name] for name in members if name in statistics.frames]
    return group_problem(model, members, norms, [moments[name] for name in members], frames=frames)
