"""Channels that live inside of one block are left out, and the layers that read them make up for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.mean_owner import output_mean_owner
from sharefold.calibration.problem import problem_of
from sharefold.calibration.statistics import Statistics, is_wide
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.hidden_channels import HiddenSpace
from sharefold.layers import checked_form, shift_output
from sharefold.layers.width import give_columns, give_rows, set_columns, take_columns, take_rows
from sharefold.methods.contract import ConversionStep, Solution
from sharefold.plans import GroupPlan
from sharefold.solvers.channel_elimination import Elimination, Reader, columns, compensation, eliminate, error_without
from sharefold.untrusted import is_int

# Fewest channels that a space keeps, and the share of them below which no curve goes.
FEWEST, LEAST_SHARE = 2, 0.1
WORD = 64
_NAMES = ("gates", "through", "readers")


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


class Fold(ConversionStep):
    """Leaves channels out of one hidden space (:class:`sharefold.graph.hidden_channels.HiddenSpace`). One space a group.

    The only member is the layer that writes the channels. Options: ``keep``, how many stay; ``channels``, how many the dense
    network has; ``gates``, ``through``, ``readers``: the modules of the space; ``kept``, which ones stay, as
    hexadecimal numbers of 64 bits each (the lowest bit of the first: channel 0). Without ``kept`` they are chosen here.
    """

    name = "fold"
    paper = "https://arxiv.org/abs/2502.10216"
    option_names = frozenset({"keep", "channels", "gates", "through", "readers", "kept"})
    smallest_group = 1

    def layers(self, graph: NetworkGraph, plan: GroupPlan) -> tuple[str, ...]:
        return space_of(plan).readers

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        where, options = f"plan: group {plan.name!r}", plan.options
        if len(plan.members) != 1:
            raise SharefoldError(f"{where}: method fold takes one layer a group, the one that writes the channels")
        if not all(is_int(options.get(key)) for key in ("keep", "channels")):
            raise SharefoldError(f"{where}: method fold needs the options keep and channels, both integers")
        if not FEWEST <= options["keep"] <= options["channels"]:
            raise SharefoldError(f"{where}: keep must be {FEWEST} to {options['channels']}, not {options['keep']}")
        if not options.get("readers") or not all(
            isinstance(options.get(key, []), list) and all(isinstance(name, str) for name in options.get(key, []))
            for key in _NAMES
        ):
            raise SharefoldError(f"{where}: method fold needs readers, a list of layer names, and perhaps gates and through")
        kept = _read_bits(options["kept"], where) if "kept" in options else range(options["keep"])
        if len(kept) != options["keep"] or kept[-1] >= options["channels"]:
            raise SharefoldError(f"{where}: kept does not hold {options['keep']} channels of {options['channels']}: leave it out")
        space = space_of(plan)
        for name in space.layers:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise SharefoldError(
                    f"{where} names {name!r}, which this model does not have: was the plan made for another model?"
                ) from None
            if name not in space.through:
                form = checked_form(name, module)
                width = form.in_channels if name in space.readers else form.out_channels
                if width != space.channels or form.groups != 1:
                    raise SharefoldError(f"{where}: {name} has {width} channels there, not {space.channels}, or groups")
                if name in space.readers and is_wide(form):
                    raise SharefoldError(f"{where}: {name} has {form.features} inputs, too many to fold: exclude it")

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        space, keep = space_of(plan), plan.options["keep"]
        statistics.moments(space.readers)
        readers = readers_of(model, graph, statistics, space)
        if "kept" in plan.options or keep == space.channels:
            kept = _recorded(plan)
        else:
            kept = elimination_of(readers, space, shares_of(statistics, space, readers)).kept(keep)
        members, owners, errors = [], [], []
        for name, reader in zip(space.readers, readers, strict=True):
            mix = compensation(reader.moment, kept, space.channels)
            tensors, layer = {"mix": mix}, model.get_submodule(name)
            owner = output_mean_owner(model, layer, graph.layers[name].norm)
            if owner is not None and statistics.centered.get(name, False):
                mean = statistics.means[name][0].to(mix)
                mine, gone = columns(kept, space.channels, len(mean))
                tensors["lost"] = mean[gone] - mix @ mean[mine]
            owners.append("" if "lost" not in tensors else name if owner is layer else str(graph.layers[name].norm))
            members.append(tensors)
            errors.append(error_without(reader, kept, space.channels, mix))
        return Folding({}, members, torch.tensor(errors), {"kept": as_bits(kept, space.channels)}, kept, tuple(owners))

    @torch.no_grad()
    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        space = space_of(plan)
        kept = _recorded(plan) if solution is None else cast(Folding, solution).kept
        for index, name in enumerate(space.readers):
            if solution is None:
                take_columns(model.get_submodule(name), kept)
            else:
                _make_up(model, name, cast(Folding, solution).owners[index], solution.members[index], kept, space.channels)
        for name in space.carriers:
            take_rows(model.get_submodule(name), kept, space.channels)

    @torch.no_grad()
    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        space, kept = space_of(plan), _recorded(plan)
        for name in space.carriers:
            give_rows(model.get_submodule(name), kept, space.channels)
        for name in space.readers:
            give_columns(model.get_submodule(name), kept, space.channels)


def kept_rows(groups: Sequence[GroupPlan]) -> dict[str, Tensor]:
    """Layer -> those of its output channels that stay, for every layer that the ``groups``, as carried out, made narrower."""
    found: dict[str, Tensor] = {}
    for group in groups:
        space = space_of(group)
        found |= dict.fromkeys(space.carriers, _recorded(group))
    return found


def space_of(plan: GroupPlan) -> HiddenSpace:
    """The hidden space that a plan of method fold is about."""
    options = plan.options
    gates, through, readers = (tuple(options.get(key, ())) for key in ("gates", "through", "readers"))
    return HiddenSpace(plan.members[0], options["channels"], gates, through, readers, plan.stage, plan.role)


def options_for(space: HiddenSpace, kept: Tensor) -> dict[str, Any]:
    """The options of a plan that keeps these channels (k,) of ``space``."""
    named = {key: list(getattr(space, key)) for key in _NAMES}
    bits = as_bits(kept, space.channels)
    return {"keep": len(kept), "channels": space.channels, **{key: names for key, names in named.items() if names}, "kept": bits}


def readers_of(model: nn.Module, graph: NetworkGraph, statistics: Statistics, space: HiddenSpace) -> list[Reader]:
    """The space's readers, each with its output's energy as the unit of its errors."""
    readers = []
    for name in space.readers:
        problem = problem_of(model, graph, [name], statistics)
        # On the CPU: some devices have no float64, and on others so many small steps are slow.
        tensors = problem.weights[0], problem.moments[0, 0], problem.row_weights[0]
        weight, moment, rows = (tensor.cpu().double() for tensor in tensors)
        energy = ((weight @ moment) * weight).sum(1) @ rows
        readers.append(Reader(weight, moment, rows / energy.clamp_min(1e-30)))
    return readers


def elimination_of(readers: list[Reader], space: HiddenSpace, shares: list[float]) -> Elimination:
    """In which order the space's channels go, and the relative errors of its :func:`readers <readers_of>`.

    Args:
        shares: how much each counts, :func:`shares_of`.
    """
    return eliminate(readers, space.channels, max(FEWEST, int(LEAST_SHARE * space.channels)), shares)


def shares_of(statistics: Statistics, space: HiddenSpace, readers: list[Reader]) -> list[float]:
    """How much each reader's relative error counts; they add up to one.

    By what losing its output would cost, as :func:`sharefold.planner.objectives.fisher` has it.
    """
    if len(readers) == 1:
        return [1.0]
    sensitivity = statistics.sensitivity()
    shares = [_share(r, sensitivity.get(name)) for r, name in zip(readers, space.readers, strict=True)]
    return [share / sum(shares) for share in shares]


def _share(reader: Reader, sensitivity: Tensor | None) -> float:
    if sensitivity is None:
        return 1.0
    energy = ((reader.weight @ reader.moment) * reader.weight).sum(1)
    return float((sensitivity.to(energy) @ energy / 2).clamp_min(1e-12).sqrt())


def as_bits(kept: Tensor, channels: int) -> list[str]:
    """Indices as the bits of hexadecimal numbers, ``WORD`` channels each."""
    bits = sum(1 << int(c) for c in kept)
    return [f"{bits >> start & (1 << WORD) - 1:x}" for start in range(0, channels, WORD)]


def _read_bits(words: Any, where: str) -> list[int]:
    try:
        bits = sum(int(word, 16) << WORD * index for index, word in enumerate(words))
    except (TypeError, ValueError):
        raise SharefoldError(f"{where}: kept must be a list of hexadecimal numbers: leave it out") from None
    return [c for c in range(bits.bit_length()) if bits >> c & 1] if bits > 0 else []


def _recorded(plan: GroupPlan) -> Tensor:
    """The channels that a plan keeps; the first ones where it says only how many."""
    if "kept" not in plan.options:
        return torch.arange(plan.options["keep"])
    return torch.tensor(_read_bits(plan.options["kept"], f"plan: group {plan.name!r}"))


def _make_up(model: nn.Module, name: str, owner: str, tensors: dict[str, Tensor], kept: Tensor, channels: int) -> None:
    """Takes the columns out of a reader's weight, of however many rows it has by now."""
    layer = model.get_submodule(name)
    weight = cast(Tensor, layer.weight).detach()
    new, shift, _ = made_up(weight, tensors, kept, channels)
    set_columns(layer, new.reshape(len(weight), len(kept), *weight.shape[2:]).to(weight))
    if shift is None:
        return
    shift_output(model.get_submodule(owner), shift)


def made_up(
    weight: Tensor, tensors: dict[str, Tensor], kept: Tensor, channels: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A reader's weight on the columns that stay, changed so that they make up for the others.

    Args:
        weight: (O, I, h, w) or (O, I).
        tensors: the reader's of a :class:`Folding`.

    Returns:
        (O, k * b) in float64 on the CPU; (O,) what the mean of the output loses all the same, None where nothing can give it
        back; and the columns that stay.
    """
    flat = weight.detach().flatten(1).cpu().double()
    mine, gone = columns(kept, channels, flat.shape[1])
    shift = flat[:, gone] @ tensors["lost"] if "lost" in tensors else None
    return flat[:, mine] + flat[:, gone] @ tensors["mix"], shift, mine
