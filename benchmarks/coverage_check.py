"""One architecture through the whole job: built, inspected, converted to half its parameters, saved, loaded, compared.

What ``coverage.py`` does to every model of the registries, and the tests to a few. Small networks go through it for
real (:func:`convert_for_real`), with random weights; large ones on the meta device, where a plan that needs no data
(:func:`uniform_plan`) is carried out with blank tensors and counted (:func:`convert_blank`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from timm.layers import CondConv2d
from torch import Tensor, nn

import sharefold
from sharefold.architectures.build import build_base, build_on_meta, make_base
from sharefold.calibration.images import input_config
from sharefold.errors import SharefoldError
from sharefold.format import distinct
from sharefold.graph import Group, NetworkGraph, analyze, find_groups
from sharefold.graph.trace import tensors_in
from sharefold.layers import checked_form
from sharefold.measure import count_parameters
from sharefold.methods import method_named, step_named
from sharefold.methods.checks import check_plan
from sharefold.options import PlanOptions
from sharefold.planner import find_candidates, find_units
from sharefold.plans import GroupPlan, Plan
from sharefold.procedural import dead_leaves
from sharefold.store.plain_size import plain_bytes

BUDGET = 0.5
SIZES = (64, 96, 128)  # tried in this order before the network's own input size
IMAGES = 6
NOTHING = "nothing to share: no layer has a cheaper form"
CPU_LIMIT = 400_000_000  # networks that only run on real tensors are counted on the CPU up to this size


class Stated(Exception):
    """Why an architecture is no case for the tool, or is not converted: a reason, not a failure."""


@dataclass
class Row:
    """One line of the table; None where the job did not get that far.

    Attributes:
        traced: ``fx`` or ``hooks``.
        groups, layers: groups of isomorphic layers, and convertible layers.
        shareable: share of the parameters that lies in convertible layers.
        reduced_to: share of the parameters after conversion.
        mode: ``real`` (weights, images, file), ``meta`` or ``cpu`` (planned, installed blank, counted, run).
        reason: why not, or what is worth knowing; failures begin with ``failed``.
    """

    model: str
    library: str
    family: str
    parameters: int | None = None
    traced: str = ""
    groups: int | None = None
    layers: int | None = None
    shareable: float | None = None
    reduced_to: float | None = None
    mode: str = ""
    seconds: float | None = None
    reason: str = ""


def check(row: Row, *, limit: int = 8_000_000, method: Sequence[str] | str = ("basis", "svd")) -> Row:
    """Fills the ``row`` of a registered architecture; whatever goes wrong becomes its reason.

    Args:
        limit: networks of more parameters are planned and counted on the meta device only.
    """
    start = time.perf_counter()
    try:
        _check(row, limit, method)
    except Stated as stated:
        row.reason = str(stated)
    except Exception as error:  # a crash of one architecture is a line of the table
        row.reason = f"failed: {brief(error)}"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _check(row: Row, limit: int, method: Sequence[str] | str) -> None:
    base = make_base(row.library, row.model, {})
    torch.manual_seed(0)
    try:
        model = build_on_meta(base)
    except SharefoldError as error:
        raise Stated(f"cannot be built: {brief(error)}") from None
    row.parameters = count_parameters(model)
    everything = row.library == "torchvision"
    if row.parameters <= limit:
        model = build_base(base)
        vary(model)
        images = images_for(model)
        row.mode = "real"
        graph = inspect(row, model, images[:1], everything)
        with tempfile.TemporaryDirectory() as folder, quick():
            row.reduced_to, row.reason = convert_for_real(model, images, Path(folder), method=method, graph=graph)
        return
    row.mode = "meta"
    image = torch.empty(1, *input_config(model)["input_size"], device="meta")
    try:
        graph = inspect(row, model, image, everything)
    except SharefoldError as error:  # forward code that reads values
        if row.parameters > CPU_LIMIT:
            raise Stated(f"does not run on the meta device and is too large for memory: {brief(error)}") from None
        row.mode = "cpu"
        model, image = build_base(base), torch.rand(image.shape)
        graph = inspect(row, model, image, everything)
    row.reduced_to, row.reason = convert_blank(model, image, graph)


@torch.no_grad()
def vary(model: nn.Module) -> None:
    """Adds noise to parameters of one value, so that no zero-initialised scale or head hides what a layer computes."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.empty_like(parameter).uniform_(0.05, 0.15))


def images_for(model: nn.Module, sizes: Sequence[int] = SIZES) -> Tensor:
    """A few procedural images of the first of ``sizes`` that ``model`` takes, or of its own size; (n, C, H, W).

    Raises:
        Stated: the network does not run at its own input size either.
    """
    channels, height, width = input_config(model)["input_size"]
    for size in [(size, size) for size in sizes if size < min(height, width)] + [(height, width)]:
        images = (dead_leaves(IMAGES, size, channels) - 0.5) / 0.25
        try:
            with torch.no_grad():
                model.eval()(images[:2])
            return images
        except Exception as error:  # fixed input sizes, maps that become empty
            cause = error
    raise Stated(f"does not run at its own input size {height}x{width}: {brief(cause)}")


def inspect(row: Row, model: nn.Module, image: Tensor, everything: bool = True) -> NetworkGraph:
    """Reads ``model`` and notes what was found.

    Args:
        everything: also go on with networks that are not conv-dominated.

    Raises:
        Stated: not conv-dominated.
    """
    graph = analyze(model, image)
    total = max(1, count_parameters(model))
    row.traced, row.layers, row.groups = graph.traced, len(graph.layers), len(find_groups(graph))
    row.shareable = round(sum(model.get_submodule(name).weight.numel() for name in graph.layers) / total, 4)
    share = map_share(model, graph)
    if not everything and share <= 0.5:
        row.mode = ""
        raise Stated(f"not conv-dominated: {share:.0%} of its parameters work on channel maps")
    return graph


def map_share(model: nn.Module, graph: NetworkGraph) -> float:
    """Share of the parameters in convolutions, and in Linears that run at every position of a map."""
    convs = sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvNd | CondConv2d)
        for p in m.parameters(recurse=False)
    )
    linears = sum(
        p.numel()
        for name, record in graph.layers.items()
        if record.kind == "linear" and min(record.input_size) > 1
        for p in model.get_submodule(name).parameters(recurse=False)
    )
    return (convs + linears) / max(1, count_parameters(model))


def convert_for_real(
    model: nn.Module, images: Tensor, folder: Path, *, method: Sequence[str] | str = ("basis", "svd"),
    graph: NetworkGraph | None = None, fresh: Callable[[], nn.Module] | None = None,
) -> tuple[float, str]:  # fmt: skip
    """Plans, converts in place, runs, saves and loads ``model``.

    Args:
        fresh: builds the dense architecture for ``load``; None for registered ones, which it builds by itself.

    Returns:
        Share of the parameters that is left, and "" or what kept it above the budget.

    Raises:
        AssertionError: a promise is broken: size, count, or the outputs of the loaded network.
        Stated: there is nothing to share.
    """
    before, original = count_parameters(model), plain_bytes(distinct(model.state_dict())[0])
    cal = sharefold.calibrate(model, images, graph=graph)
    candidates = find_candidates(cal, PlanOptions(method))
    limit = max(int(BUDGET * before), candidates.floor)
    if limit >= before:
        raise Stated(NOTHING)
    note = _above(limit / before) if limit > BUDGET * before else ""
    plan = candidates.plan(candidates.pick(limit, f"{limit:,}"), f"{limit:,}")
    done = sharefold.convert_(model, plan, cal, repair=False)
    after = count_parameters(model)
    assert after <= limit, f"{after:,} parameters are more than the budget of {limit:,}"
    assert after == plan.params_after == done.plan.params_after, f"{after:,} parameters, planned {plan.params_after:,}"
    wanted = outputs(model, images)
    assert all(bool(torch.isfinite(t).all()) for t in wanted), "the outputs are not finite"
    path = sharefold.save(model, folder / "net.safetensors")
    size = path.stat().st_size
    assert size <= original, f"the file has {size:,} bytes, that of the original {original:,}"
    loaded = sharefold.load(path, model=None if fresh is None else fresh())
    found = outputs(loaded, images)
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), "the loaded network computes otherwise"
    return round(after / before, 4), note


@contextmanager
def quick() -> Iterator[None]:
    """Shared bases are fitted in one round, their error curves in none: how good they are is measured elsewhere."""
    with (
        mock.patch("sharefold.methods.basis.curve_effort", lambda features: {}),
        mock.patch("sharefold.methods.basis.solve_effort", lambda features: {"rounds": 1}),
    ):
        yield


def outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Every tensor of the network's output, whatever holds them."""
    with torch.no_grad():
        return list(tensors_in(model.eval()(images)))


def convert_blank(model: nn.Module, image: Tensor, graph: NetworkGraph) -> tuple[float, str]:
    """Plans without data, puts blank shared layers in place, counts them and runs the network for its output shapes.

    Raises:
        AssertionError: a count or a shape is not what was planned.
    """
    before, wanted = count_parameters(model), outputs(model, image)
    plan = uniform_plan(model, graph)
    check_plan(model, plan)
    for group in plan.groups:
        step_named(group.method).install(model, group, None)
    after, found = count_parameters(model), outputs(model, image)
    assert after == plan.params_after, f"{after:,} parameters, planned {plan.params_after:,}"
    # A detector's blank network finds another number of boxes.
    kept = len(found) == len(wanted) and all(a.shape[1:] == b.shape[1:] for a, b in zip(found, wanted, strict=True))
    assert kept, "the converted network's outputs have other shapes"
    return round(after / before, 4), _above(after / before) if after > BUDGET * before else ""


def uniform_plan(model: nn.Module, graph: NetworkGraph) -> Plan:
    """Every group at the same share of the rank at which sharing stops paying, as large as the budget allows.

    Needs shapes only: groups share a basis, other layers become low-rank ones. At its floor where the budget is
    out of reach.

    Raises:
        Stated: there is nothing to share.
    """
    before = count_parameters(model)
    units = [found for unit in find_units(graph) if (found := _ranks(model, unit)) is not None]
    if not units:
        raise Stated(NOTHING)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        saved = sum(group.params_before - group.params_after for group in _at(middle, units))
        low, high = (middle, high) if before - saved <= BUDGET * before else (low, middle)
    groups = _at(low, units)
    return Plan(groups, before, before - sum(g.params_before - g.params_after for g in groups), "uniform ranks")


def _ranks(model: nn.Module, unit: Group) -> tuple[Group, str, int, int, int] | None:
    """(unit, method, its parameters, parameters of one rank, largest rank that saves any); None if none does."""
    forms = [checked_form(name, model.get_submodule(name)) for name in unit.members]
    dense = sum(form.out_channels * form.features for form in forms)
    name = "basis" if len(forms) > 1 else "svd"
    if name == "svd" and unit.groups > 1:
        return None
    method = method_named(name)
    each = method.cost(forms, {"rank": 1})
    most = min((dense - 1) // each, method.largest(forms)["rank"])
    return None if most < 1 else (unit, name, dense, each, most)


def _at(share: float, units: Sequence[tuple[Group, str, int, int, int]]) -> list[GroupPlan]:
    ranks = [max(1, int(share * most)) for *_, most in units]
    return [
        GroupPlan(unit.name, name, unit.members, {"rank": rank}, dense, rank * each, None, unit.stage, unit.role)
        for rank, (unit, name, dense, each, _) in zip(ranks, units, strict=True)
    ]


def _above(share: float) -> str:
    return f"{BUDGET:.0%} is out of reach: {share:.1%} is the floor"


def brief(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, SharefoldError) else f"{type(error).__name__}: {text}")[:240]
