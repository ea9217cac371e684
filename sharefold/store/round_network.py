"""One rounding of a whole network: layer after layer, each making up for those before it, then the norms and offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sharefold.calibration.pairs import by_group
from sharefold.inputs import Input
from sharefold.layers import SharedConv, mean_output, weight_matrix
from sharefold.plans import Progress
from sharefold.repair.lockstep import Visited, Wanted, walk
from sharefold.repair.means import give_mean
from sharefold.solvers.least_squares import ROUNDING_PULL, PulledLeastSquares
from sharefold.solvers.moments import Moments, PairSums
from sharefold.store.gathering import gather, runs
from sharefold.store.norm_absorption import Gain, absorb_statistics, gains_of, take_up
from sharefold.store.prepare import Prepared, matrices, plan_of
from sharefold.store.rounding import rounded_from
from sharefold.store.specs_for import halves_and_offsets, matrix_spec, snap_
from sharefold.store.tensor_spec import StoreRequest, StoreSpec


@dataclass(frozen=True)
class RoundedNetwork:
    """What :func:`round_network` did.

    Attributes:
        spec: how every tensor is stored.
        sequential: whether every layer was fitted to the outputs of the original on the inputs that the rounded layers before it
            give.
        positions: what the values of each rounded matrix (O, N) were when they were rounded, float32, in steps of their rows.
    """

    spec: StoreSpec
    sequential: bool
    positions: dict[str, Tensor] = field(repr=False, compare=False)


@torch.no_grad()
def round_network(
    model: nn.Module, teacher: nn.Module, prepared: Prepared, request: StoreRequest, images: Input,
    progress: Progress | None,
) -> RoundedNetwork:  # fmt: skip
    """Rounds every tensor of ``model`` in place, in eval mode like ``teacher``."""
    wanted, plan = matrices(model), plan_of(model)
    absorbing = request.kind != "grid" or request.bits < 8
    rounder = _Rounder(wanted, prepared, request, gains_of(model, prepared.graph, wanted, plan) if absorbing else {})
    for name in wanted:
        if name.startswith("sharefold_banks."):
            rounder.settle(name, prepared.metrics.get(name))
    done: set[str] = set()

    def layer(name: str, inputs: PairSums | None) -> None:
        if name in done or inputs is None:
            return
        done.add(name)
        _round_layer(model, teacher, name, prepared.graph.layers[name].norm, inputs, prepared.centered[name], rounder)
        if progress:
            progress("rounding", len(done), len(prepared.forms))

    sequential = _sequential(model, teacher, prepared, images, layer)
    if not sequential:
        for run in runs({n: f for n, f in prepared.forms.items() if n not in done}):
            gathered = gather(model, {n: prepared.forms[n] for n in run}, prepared.centered, images)
            for name in run:
                layer(name, gathered.get(name))
    for name in wanted:
        if name not in rounder.spec.tensors:
            rounder.settle(name, None)
    if absorbing:
        absorb_statistics(model, plan)
        rounder.take_gains(model)
    found = halves_and_offsets(model, prepared, rounder.gains, request)
    found.tensors.update(rounder.spec.tensors)
    snap_(model, found)
    return RoundedNetwork(found, sequential, rounder.positions)


class _Rounder:
    """Rounds matrices where they stand. Rows that will take up the gain of a norm lie on their grid when multiplied by it."""

    def __init__(
        self, wanted: dict[str, nn.Parameter], prepared: Prepared, request: StoreRequest, gains: dict[str, Gain]
    ) -> None:
        self.wanted, self.prepared, self.request, self.gains = wanted, prepared, request, gains
        self.spec = StoreSpec({})
        self.positions: dict[str, Tensor] = {}
        self._multiplied: dict[str, Tensor] = {}

    def settle(self, name: str, metric: Tensor | None) -> None:
        tensor, rows, gain = self.wanted[name], self.prepared.rows[name], self.gains.get(name)
        matrix = tensor.detach().cpu().flatten(1)
        scale = None if gain is None else gain.scale.unsqueeze(1)
        if scale is not None:
            power = scale.square().flatten()
            matrix, rows = (matrix.double() * scale).to(matrix), torch.where(power > 0, rows / power, rows)
        entry = self.spec.tensors[name] = matrix_spec(matrix, rows, self.request, metric)
        rounded, before = rounded_from(matrix, entry, metric)
        self.positions[name] = before / entry.row_scales()
        if scale is not None:
            self._multiplied[name] = rounded
            rounded = torch.where(scale == 0, 0.0, rounded / scale)
        tensor.copy_(rounded.reshape(tensor.shape).to(tensor))

    def take_gains(self, model: nn.Module) -> None:
        """Multiplies the rows by the gains of the norms, which become 1; statistics are absorbed already."""
        for name, gain in self.gains.items():
            take_up(model, gain)
            tensor = self.wanted[name]
            tensor.copy_(self._multiplied[name].reshape(tensor.shape).to(tensor))


def _sequential(
    model: nn.Module, teacher: nn.Module, prepared: Prepared, images: Input,
    layer: Callable[[str, PairSums | None], None],
) -> bool:  # fmt: skip
    graph = prepared.graph
    if graph.fx_graph is None or len(prepared.forms) < len(graph.layers):
        return False

    def visit(at: Visited) -> None:
        pairs = Moments(torch.float32, "cpu")
        pairs.add(*by_group(at.samples.x, at.samples.y))
        layer(at.name, pairs.pairs(prepared.centered[at.name]))

    walk(graph.fx_graph, teacher, model, images, {name: Wanted(form) for name, form in prepared.forms.items()}, visit)
    return True


def _round_layer(
    model: nn.Module, teacher: nn.Module, name: str, norm: str | None, inputs: PairSums, centered: bool,
    rounder: _Rounder,
) -> None:  # fmt: skip
    module = model.get_submodule(name)
    if isinstance(module, SharedConv):
        part = module.linear_part()
        if part is not None:
            _round_factors(module, name, inputs, rounder)
    elif f"{name}.weight" in rounder.wanted and not rounder.prepared.forms[name].transposed:  # whose rows are inputs
        weight = rounder.wanted[f"{name}.weight"]
        weight.copy_(_refitted(weight.flatten(1), inputs.gram, inputs.cross).reshape(weight.shape).to(weight))
        rounder.settle(f"{name}.weight", inputs.gram)
    if centered:
        _match_mean(model, teacher, name, norm, inputs)


def _round_factors(module: SharedConv, name: str, inputs: PairSums, rounder: _Rounder) -> None:
    if module.pivoted_name is not None and f"{name}.{module.pivoted_name}" in rounder.wanted:
        rounder.settle(f"{name}.{module.pivoted_name}", module.own_moments(inputs.gram.double().mean(0, keepdim=True)))
    part = module.linear_part()
    assert part is not None
    flat = part[0].detach().cpu().double().flatten(1)
    gram = flat @ inputs.gram.double() @ flat.T
    cross = inputs.cross.double() @ flat.T
    module.set_linear_part(_refitted(part[1], gram, cross).to(part[1]))
    coefficients = f"{name}.{module.coefficients_name}"
    if coefficients in rounder.wanted:
        rounder.settle(coefficients, gram)


def _refitted(matrix: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """The matrix (O, N) that best gives the wanted outputs, pulled towards what it is."""
    old = matrix.detach().cpu().double().reshape(len(gram), -1, gram.shape[1])
    solved = PulledLeastSquares(gram.double(), ROUNDING_PULL).solve(cross.double(), old)
    return (old if solved is None else solved).reshape(matrix.shape)


def _match_mean(model: nn.Module, teacher: nn.Module, name: str, norm: str | None, inputs: PairSums) -> None:
    """Gives the layer's output the mean that is wanted, through its bias or its norm's running mean, if neither is protected."""
    layer, plan = model.get_submodule(name), plan_of(model)
    if plan.protects(name) or (norm is not None and plan.protects(norm)):
        return
    weight = weight_matrix(layer).detach()
    ours = mean_output(weight.cpu().double(), inputs.mean.double())
    give_mean(teacher, model, layer, norm, inputs.mean_y.flatten() - ours)
