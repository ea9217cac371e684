"""Channels that live inside of one block are left out, and the layers that read them make up for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.problem import GroupProblem, problem_of
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.hidden_channels import HiddenSpace
from sharefold.layers import Bank, ConvForm, SharedConv, checked_form
from sharefold.layers.width import give_columns, give_rows, set_columns, take_rows
from sharefold.methods.contract import Choice, Method, Solution
from sharefold.plans import GroupPlan
from sharefold.solvers.channel_elimination import (
    Elimination, Reader, column_index, compensation, eliminate, error_without, left_out,
)  # fmt: skip

if TYPE_CHECKING:
    from sharefold.calibration.statistics import Statistics

# Fewest channels that a space keeps, and the share of them below which no curve goes.
FEWEST, LEAST_SHARE = 2, 0.1


@dataclass
class Folding(Solution):
    """What a space keeps, and how each reader makes up for the rest.

    Attributes:
        kept: (k,) sorted channels.
        members: per reader ``mix`` (R, A), which turns the weights of the columns that go into additions to those that stay, and
            where the mean can be absorbed ``lost`` (R,): what of the mean input is lost with each.
        owners: per reader the module whose bias or running mean takes the mean up, or "".
    """

    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    owners: tuple[str, ...] = ()


class Fold(Method):
    """Leaves channels out of one hidden space (:class:`sharefold.graph.hidden_channels.HiddenSpace`). One space a group.

    The only member is the layer that writes the channels. Options: ``keep``, their number, or a list of those that stay;
    ``channels``, how many the dense network has; ``gates``, ``through``, ``readers``: the modules of the space. What has been
    carried out also says which channels stayed, as the bits of the hexadecimal number ``kept`` (lowest: channel 0).
    """

    name = "fold"
    paper = "https://arxiv.org/abs/2502.10216"
    smallest_group = 1

    def choices(self, problem: GroupProblem) -> list[Choice]:
        return []  # planned by spaces, not by layers: sharefold/planner/fold_levels.py

    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        raise SharefoldError("method fold takes the channels between layers, not layers")

    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        return Solution({}, [{} for _ in forms])

    def member(self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]) -> SharedConv:
        raise NotImplementedError("folded layers stay the modules that they are")

    def layers(self, graph: NetworkGraph, plan: GroupPlan) -> tuple[str, ...]:
        return space_of(plan).readers

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        where = f"plan: group {plan.name!r}"
        if len(plan.members) != 1:
            raise SharefoldError(f"{where}: method fold takes one layer a group, the one that writes the channels")
        options = plan.options
        channels, keep = options.get("channels"), options.get("keep")
        chosen = keep if isinstance(keep, list) else [keep]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (channels, *chosen)):
            raise SharefoldError(f"{where}: method fold needs the options channels, an integer, and keep, an integer or a list of them")
        space = space_of(plan)
        if not space.readers or not all(isinstance(name, str) for name in space.layers):
            raise SharefoldError(f"{where}: method fold needs the names of the layers that read the channels as option readers")
        count = len(keep) if isinstance(keep, list) else keep
        if not FEWEST <= count <= space.channels or (
            isinstance(keep, list) and (len(set(keep)) != len(keep) or not all(0 <= c < space.channels for c in keep))
        ):
            raise SharefoldError(f"{where}: keep must be {FEWEST} to {space.channels} different channels of {space.channels}")
        for name in space.layers:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise SharefoldError(f"{where} names {name!r}, which this model does not have: was the plan made for another "
                                     "model?") from None
            if name in (*space.readers, space.writer, *space.gates):
                form = checked_form(name, module)
                width = form.in_channels if name in space.readers else form.out_channels
                if width != space.channels or form.groups != 1:
                    raise SharefoldError(f"{where}: {name} has {width} channels there, not {space.channels}, or groups")

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        space, keep = space_of(plan), plan.options["keep"]
        readers = readers_of(model, graph, statistics, space)
        if isinstance(keep, list):
            kept = torch.tensor(sorted(keep))
        elif keep == space.channels:
            kept = torch.arange(keep)
        else:
            kept = elimination_of(model, graph, statistics, space).kept(keep)
        members, owners, errors = [], [], []
        for name, reader in zip(space.readers, readers, strict=True):
            mix = compensation(reader.moment, kept, space.channels)
            tensors = {"mix": mix}
            owner = output_mean_owner(model, model.get_submodule(name), graph.layers[name].norm)
            if owner is not None and statistics.centered.get(name, False):
                mean = statistics.means[name][0].to(mix)
                block = len(mean) // space.channels
                mine, gone = (column_index(c, block).to(mean.device) for c in (kept, left_out(kept, space.channels)))
                tensors["lost"] = mean[gone] - mix @ mean[mine]
            owners.append("" if "lost" not in tensors else name if owner is model.get_submodule(name) else str(graph.layers[name].norm))
            members.append(tensors)
            errors.append(error_without(reader, kept, space.channels))
        options = {"keep": len(kept), "kept": as_bits(kept)}
        return Folding({}, members, torch.tensor(errors), options, kept, tuple(owners))

    @torch.no_grad()
    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        space = space_of(plan)
        if solution is None:
            kept = _recorded(plan)
        else:
            kept = cast(Folding, solution).kept
            for name, owner, tensors in zip(space.readers, cast(Folding, solution).owners, solution.members, strict=True):
                _make_up(model, name, owner, tensors, kept, space.channels)
        if solution is None:
            for name in space.readers:
                layer = model.get_submodule(name)
                set_columns(layer, cast(Tensor, layer.weight).detach().index_select(1, kept.to(layer.weight.device)))  # type: ignore[arg-type]
        for name in (space.writer, *space.gates, *space.through):
            take_rows(model.get_submodule(name), kept, space.channels)

    @torch.no_grad()
    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        space, kept = space_of(plan), _recorded(plan)
        for name in (space.writer, *space.gates, *space.through):
            give_rows(model.get_submodule(name), kept, space.channels)
        for name in space.readers:
            give_columns(model.get_submodule(name), kept, space.channels)


def space_of(plan: GroupPlan) -> HiddenSpace:
    """The hidden space that a plan of method fold is about."""
    options = plan.options
    gates, through, readers = (tuple(options.get(key, ())) for key in ("gates", "through", "readers"))
    return HiddenSpace(plan.members[0], options["channels"], gates, through, readers, plan.stage, plan.role)


def options_for(space: HiddenSpace, keep: int | list[int]) -> dict[str, Any]:
    """The options of a plan that keeps these channels of ``space``."""
    named = {"gates": space.gates, "through": space.through, "readers": space.readers}
    return {"keep": keep, "channels": space.channels, **{key: list(names) for key, names in named.items() if names}}


def readers_of(model: nn.Module, graph: NetworkGraph, statistics: Statistics, space: HiddenSpace) -> list[Reader]:
    """The space's readers, each with its output's energy as the unit of its errors."""
    readers = []
    for name in space.readers:
        problem = problem_of(model, graph, [name], statistics)
        weight, moment, rows = problem.weights[0].double(), problem.moments[0, 0].double(), problem.row_weights[0].double()
        energy = ((weight @ moment) * weight).sum(1) @ rows
        readers.append(Reader(weight, moment, rows / energy.clamp_min(1e-30)))
    return readers


def elimination_of(model: nn.Module, graph: NetworkGraph, statistics: Statistics, space: HiddenSpace) -> Elimination:
    """In which order the space's channels go, and the relative errors of its readers; kept in ``statistics``.

    Of several readers each counts by what losing its output would cost, as :func:`sharefold.planner.objectives.fisher` has it.
    """
    key = f"elimination {space.writer}"
    if key not in statistics.solved:
        readers = readers_of(model, graph, statistics, space)
        shares = [1.0]
        if len(readers) > 1:
            sensitivity = statistics.sensitivity()
            shares = [_share(r, sensitivity.get(name)) for r, name in zip(readers, space.readers, strict=True)]
        fewest = max(FEWEST, int(LEAST_SHARE * space.channels))
        statistics.solved[key] = eliminate(readers, space.channels, fewest, shares)
    return statistics.solved[key]


def _share(reader: Reader, sensitivity: Tensor | None) -> float:
    if sensitivity is None:
        return 1.0
    energy = ((reader.weight @ reader.moment) * reader.weight).sum(1)
    return float((sensitivity.to(energy) @ energy / 2).clamp_min(1e-12).sqrt())


def as_bits(kept: Tensor) -> str:
    """Indices as the bits of a hexadecimal number."""
    return f"{sum(1 << int(c) for c in kept):x}"


def _recorded(plan: GroupPlan) -> Tensor:
    """The channels that a plan says were kept; the first ones where it says only how many."""
    keep, kept = plan.options["keep"], plan.options.get("kept")
    if isinstance(keep, list):
        return torch.tensor(sorted(keep))
    if kept is None:
        return torch.arange(keep)
    bits = int(kept, 16)
    return torch.tensor([c for c in range(plan.options["channels"]) if bits >> c & 1])


def _make_up(model: nn.Module, name: str, owner: str, tensors: dict[str, Tensor], kept: Tensor, channels: int) -> None:
    """Takes the columns out of a reader's weight, of however many rows it has by now."""
    layer = model.get_submodule(name)
    weight = cast(Tensor, layer.weight).detach()
    flat = weight.flatten(1).double()
    block = flat.shape[1] // channels
    mine, gone = (column_index(c, block).to(weight.device) for c in (kept, left_out(kept, channels)))
    new = flat[:, mine] + flat[:, gone] @ tensors["mix"].to(flat)
    set_columns(layer, new.reshape(len(weight), len(kept), *weight.shape[2:]).to(weight))
    if owner:
        shift = flat[:, gone] @ tensors["lost"].to(flat)
        if owner == name:
            cast(Tensor, layer.bias).add_(shift.to(weight))
        else:
            mean = cast(Tensor, model.get_submodule(owner).running_mean)
            mean.sub_(shift.to(mean))
