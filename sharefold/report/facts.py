"""What a report shows, gathered before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sharefold.graph import analyze
from sharefold.inputs import Tensors
from sharefold.layers import any_form_of, weight_matrix
from sharefold.methods import step_named
from sharefold.plans import GroupPlan, Plan
from sharefold.repair.step_record import StepRecord

POINTS = 65  # of a spectrum's curve
WIDEST = 2048  # smaller side of a matrix whose whole spectrum is computed; beyond, its largest part
# Ten hues that stay apart in light and dark and for colour-blind readers; groups beyond the tenth start over.
COLOURS = (
    "#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5", "#7a8b1f",
)  # fmt: skip


@dataclass(frozen=True)
class LayerFact:
    """A layer of the dense network: weight shape (O, I/groups, h, w), size of its input map, its group or None."""

    name: str
    stage: int
    block: str
    shape: tuple[int, ...]
    input_size: tuple[int, int]
    group: str | None

    @property
    def params(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class Facts:
    """Everything on the page.

    Attributes:
        title: what the network is called.
        plan: its groups.
        metrics: JSON values measured when it was made: ``params``, ``bytes``, ``macs`` ({before, after}),
            ``agreement``, ``top1_before``, ``top1_after`` ...
        layers: in forward order; empty when the architecture is not known.
        spectra: group -> cumulative share of the energy of its weights at equally spaced shares of the rank, 0 to 1.
        ranks: group -> (kept rank, full rank), for groups whose method has one.
        original: whether the spectra are those of the dense weights rather than of the shared ones.
        steps: what each step of the conversion did; empty where it is not known, or nothing was converted.
    """

    title: str
    plan: Plan
    metrics: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[LayerFact] = ()
    spectra: Mapping[str, list[float]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    original: bool = True
    steps: Sequence[StepRecord] = ()

    def colour(self, group: str) -> str:
        """The group's colour on map, table and plots."""
        names = [entry.name for entry in self.plan.groups]
        return COLOURS[names.index(group) % len(COLOURS)]


Weights = Literal["original", "shared", "none"]


def facts_of(
    title: str, plan: Plan, metrics: Mapping[str, Any] | None = None, dense: nn.Module | None = None,
    example_input: Tensors | None = None, *, weights: Weights = "original",
) -> Facts:  # fmt: skip
    """Reads the map and the spectra off the dense network.

    Args:
        dense: the network that the plan was made for; without it there is neither map nor spectrum.
        example_input: (B, C, H, W), for tracing, or a tuple of tensors.
        weights: which ones ``dense`` has: those before sharing, what sharing made of them, or none that mean something;
            then there are no spectra.
    """
    if dense is None or example_input is None:
        return Facts(title, plan, metrics or {})
    graph = analyze(dense, example_input)
    members: dict[str, tuple[str, ...]] = {}
    for group in plan.groups:
        members[group.name] = tuple(step_named(group.method).layers(graph, group))
    owner = {layer: group for group, layers in members.items() for layer in layers}
    layers = [
        LayerFact(name, record.stage, record.block, record.weight_shape, record.input_size, owner.get(name))
        for name, record in graph.layers.items()
    ]
    spectra, ranks = {}, {}
    if weights != "none":
        for group in plan.groups:
            matrices = [_matrix(dense, name, group.method) for name in members[group.name]]
            if matrices and len({m.shape[1] for m in matrices}) == 1:
                spectra[group.name] = spectrum(matrices)
                ranks.update(_rank(group, matrices))
    return Facts(title, plan, metrics or {}, layers, spectra, ranks, weights == "original")


def _matrix(model: nn.Module, name: str, method: str) -> Tensor:
    """The layer's weight as the matrix whose rank the method lowers: filters (O, N), or columns against rows."""
    layer = model.get_submodule(name)
    matrix = weight_matrix(layer).detach().float().cpu()
    form = any_form_of(layer)
    if method != "spatial" or form is None or not form.convolves:
        return matrix
    weight = matrix.reshape(form.weight_shape)
    return weight.permute(0, 3, 1, 2).reshape(weight.shape[0] * weight.shape[3], -1)


def _rank(group: GroupPlan, matrices: list[Tensor]) -> dict[str, tuple[int, int]]:
    rank = group.options.get("rank")
    rows = sum(len(matrix) for matrix in matrices)
    return {group.name: (rank, min(rows, matrices[0].shape[1]))} if isinstance(rank, int) else {}


def spectrum(matrices: Sequence[Tensor]) -> list[float]:
    """Share of the squared norm that the best r directions hold, at r / full = 0, 1/64, ..., 1; linear between ranks.

    Args:
        matrices: (O, N) each, one N; the filters of all members stacked.
    """
    stacked = torch.cat(list(matrices))
    if min(stacked.shape) > WIDEST:
        values = torch.svd_lowrank(stacked, q=WIDEST // 4)[1].square()
    else:
        gram = stacked @ stacked.T if stacked.shape[0] <= stacked.shape[1] else stacked.T @ stacked
        values = torch.linalg.eigvalsh(gram.double()).flip(0).clamp_min(0)
    total = float(stacked.double().square().sum())
    shares = torch.cat([torch.zeros(1), values.float()]).cumsum(0) / max(total, 1e-30)
    at = torch.linspace(0, min(stacked.shape), POINTS).clamp_max(len(shares) - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(len(shares) - 1)
    return [min(1.0, float(share)) for share in torch.lerp(shares[low], shares[high], at - low)]
