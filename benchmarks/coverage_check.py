"""One architecture through the whole job: built, inspected, converted to half its parameters, saved, loaded, compared.

What ``coverage.py`` does to every model of the registries, and the tests to a few. Small networks go through it for
real (:func:`convert_for_real`), with random weights; large ones on the meta device, where a plan that needs no data is carried
out with blank tensors and counted (``coverage_blank.py``).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from coverage_blank import BUDGET, NOTHING, Stated, above, convert_blank, outputs
from timm.layers import CondConv2d
from torch import Tensor, nn

import sharefold
from sharefold.architectures import yolo
from sharefold.architectures.arguments import parse_options
from sharefold.architectures.build import build_base, build_on_meta, make_base
from sharefold.calibration.images import input_config
from sharefold.errors import SharefoldError
from sharefold.format import distinct
from sharefold.graph import NetworkGraph, analyze, find_groups
from sharefold.measure import count_parameters
from sharefold.options import PlanOptions
from sharefold.outputs import OutputReading, read_outputs
from sharefold.planner import find_candidates
from sharefold.procedural import dead_leaves
from sharefold.store.plain_size import plain_bytes

SIZES = (64, 96, 128)  # tried in this order before the network's own input size
IMAGES = 6
CPU_LIMIT = 400_000_000  # networks that only run on real tensors are counted on the CPU up to this size


@dataclass
class Row:
    """One line of the table; None where the job did not get that far.

    Attributes:
        traced: ``fx`` or ``hooks``.
        groups, layers: groups of isomorphic layers, and convertible layers.
        shareable: share of the parameters that lies in convertible layers.
        reduced_to: share of the parameters after conversion.
        mode: ``real`` (weights, images, file), ``meta`` or ``cpu`` (planned, installed blank, counted, run).
        outputs: what both networks are compared by: kinds of outputs, or, where results vary in number, the modules that are
            listened to. Blank where nothing ran on real tensors.
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
    outputs: str = ""
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))


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
    name, _, arguments = row.model.partition(":")
    base = make_base(row.library, name, parse_options(arguments, row.model))
    torch.manual_seed(0)
    try:
        model = build_on_meta(base)
    except SharefoldError as error:
        raise Stated(f"cannot be built: {brief(error)}") from None
    row.parameters = count_parameters(model)
    everything = row.library != "timm"
    if row.parameters <= limit:
        model = build_base(base)
        vary(model)
        images = images_for(model)
        row.mode = "real"
        graph = inspect(row, model, images[:1], everything)
        with tempfile.TemporaryDirectory() as folder, quick():
            reading = read(row, model, images, graph)
            row.reduced_to, row.reason = convert_for_real(model, images, Path(folder), method=method, graph=graph)
            check_outputs(reading, model, images[:2])
        return
    row.mode = "meta"
    image = torch.empty(1, *input_size(model), device="meta")
    try:
        graph = inspect(row, model, image, everything)
    except SharefoldError as error:  # forward code that reads values
        if row.parameters > CPU_LIMIT:
            raise Stated(f"does not run on the meta device and is too large for memory: {brief(error)}") from None
        row.mode = "cpu"
        model, image = build_base(base), torch.rand(image.shape)
        graph = inspect(row, model, image, everything)
    reading = None if row.mode == "meta" else read(row, model, image, graph)
    row.reduced_to, row.reason = convert_blank(model, image, graph)
    if reading is not None:
        check_outputs(reading, model, image)


def input_size(model: nn.Module) -> tuple[int, ...]:
    """(C, H, W), of videos (C, T, H, W); of ultralytics' networks a small one that goes by their largest stride."""
    if yolo.is_network(model):
        return (3, 256, 256)
    if type(model).__module__.startswith("torchvision.models.video."):
        return (3, 16, 224, 224)
    return input_config(model)["input_size"]


def read(row: Row, model: nn.Module, images: Tensor, graph: NetworkGraph) -> OutputReading:
    """What ``model`` returns and is compared by, noted in ``row``."""
    reading = read_outputs(model, images, graph)
    row.outputs = " ".join(sorted({tap.name for tap in reading.taps} or {leaf.kind for leaf in reading.leaves})) or "none"
    return reading


@torch.no_grad()
def check_outputs(reading: OutputReading, model: nn.Module, images: Tensor) -> None:
    """Whether the converted network gives all that it is compared by.

    Raises:
        AssertionError: an output is missing, or has another number of images.
    """
    try:
        found = reading.run(model.eval(), images)
    except SharefoldError as error:
        raise AssertionError(f"the converted network cannot be compared: {brief(error)}") from None
    assert all(len(answer) == len(images) for answer in found), "outputs of the converted network are not one an image"


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
    channels, *frames, height, width = input_size(model)
    assert not frames, "networks for videos are larger than those that are converted for real"
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
    note = above(limit / before) if limit > BUDGET * before else ""
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
    """Shared bases are fitted in two iterations, their error curves in none: how good they are is measured elsewhere."""
    with (
        mock.patch("sharefold.methods.basis.curve_effort", lambda features: {}),
        mock.patch("sharefold.methods.basis.solve_effort", lambda features: {"iterations": 2}),
    ):
        yield


def brief(error: BaseException) -> str:
    """An exception in one line of bounded length."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, SharefoldError) else f"{type(error).__name__}: {text}")[:240]
