"""Rounding a whole network, layer by layer, each one making up for the rounding of those before it."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration
from sharefold.calibration.images import calibration_or_procedural
from sharefold.errors import SharefoldError
from sharefold.format import config_of
from sharefold.graph import analyze
from sharefold.graph.preserved import restored_on_error
from sharefold.inputs import AnyInput, Input
from sharefold.layers import to_dense
from sharefold.outputs import Divergence
from sharefold.plans import Progress
from sharefold.running import COMPUTED, evaluating
from sharefold.settings import with_plain_settings
from sharefold.state_dicts import load_tensors, tensor_state
from sharefold.store.held_codes import check_holds_none
from sharefold.store.norm_absorption import gains_of
from sharefold.store.prepare import Prepared, matrices, plan_of, prepare
from sharefold.store.round_network import RoundedNetwork, round_network
from sharefold.store.size import file_bytes, size_predictor
from sharefold.store.specs_for import halves, nearest, snap_
from sharefold.store.tensor_spec import StoreRequest, StoreSpec, carry_spec, parse_store

_ROUNDS, _MOST_ROUNDS = 4, 10  # as many to come near the budget, and to get below it
MOST_OCTAVES = 3.0  # that the step changes by at once
# Steps of "coded" that are looked at, and how near, in the logarithm, the one that fits is found: 2 % are .03 bits a weight.
SMALLEST_STEP, LARGEST_STEP = 1e-5, 0.3
STEP_TOLERANCE = 0.02
# A file this much below its budget is close enough.
_SLACK = 0.01
_SAME, _BEYOND = 0.01, 0.5  # octaves: steps so close are the same one; so far past all that were too small goes the next


@dataclass
class StoreReport:
    """``spec``, ``bytes`` of the single file, ``request`` as carried out (with its step), ``sequential`` and ``positions`` as in
    :class:`sharefold.store.round_network.RoundedNetwork`."""

    spec: StoreSpec
    bytes: int
    request: StoreRequest
    sequential: bool
    positions: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def details(self) -> dict[str, Any]:
        """For the record of a conversion's steps, JSON values."""
        return {"kind": self.request.kind, "file_bytes": self.bytes, "sequential": self.sequential}


@with_plain_settings
def quantize_(
    model: nn.Module, spec: str | StoreRequest, calibration: Calibration | AnyInput | None = None,
    original: nn.Module | None = None, seed: int = 0, progress: Progress | None = None,
) -> StoreReport:  # fmt: skip
    """Rounds ``model`` in place to what the file will hold, so that saving and loading changes nothing more.

    Args:
        model: a network that ``convert_`` converted (with an empty plan, a dense one).
        spec: ``fp16``, ``int2``..``int8``, ``kmeans2``..``kmeans8``, ``mixed:0.4MB``, or a request of
            :func:`plan_store`.
        calibration: of the dense network, of whose images the part ``fit`` is used, or (n, C, H, W) normalised images, no
            labels, or a tuple of tensors, all used; by default procedural images.
        original: the dense network whose outputs are aimed at; by default the calibrated one, else the model as it is.
        seed: of procedural images.

    Raises:
        SharefoldError: an unknown spec, a tensor of eight-bit floats, or a budget below what the coarsest rounding needs.
    """
    request = parse_store(spec)
    check_holds_none(model, "store")
    config_of(model)
    for name, tensor in tensor_state(model).items():
        if tensor.is_floating_point() and tensor.dtype not in COMPUTED:
            raise SharefoldError(f"store: tensor {name!r} is of {tensor.dtype}, which packed files cannot hold: save it without "
                                 "store, or make it a float16")  # fmt: skip
    with restored_on_error(model):
        carry_spec(model, None)
        if request.kind == "fp16":
            found = halves(model)
            snap_(model, found)
            return _finished(model, RoundedNetwork(found, False, {}), request)
        known = None
        if isinstance(calibration, Calibration) and (original is None or original is calibration.original):
            known = calibration.divergence
        images, original = _material(model, calibration, original, seed)
        dense = to_dense(model).eval()
        # Folded layers have fewer channels than the original's and nothing of it to aim at, layer by layer.
        teacher = dense if original is None or not _same_shapes(dense, original) else original
        with evaluating(model, teacher):
            return _rounded(model, teacher, dense, request, images, known, progress)


def _same_shapes(one: nn.Module, other: nn.Module) -> bool:
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    return all(shapes.get(name) == parameter.shape for name, parameter in one.named_parameters() if name.endswith("weight"))


def _rounded(
    model: nn.Module, teacher: nn.Module, dense: nn.Module, request: StoreRequest, images: Input, divergence: Divergence | None,
    progress: Progress | None,
) -> StoreReport:  # fmt: skip
    """Rounds ``model``, in eval mode like both others, and again with another step until the file has the size asked for."""
    prepared = prepare(teacher, model, analyze(dense, images[:1]), images, divergence)
    if request.kind == "coded" and request.step == 0:
        request = _step_for(model, prepared, request)
    start = copy.deepcopy(model.state_dict())
    best: tuple[int, RoundedNetwork, StoreRequest, dict[str, Tensor]] | None = None
    tried: list[tuple[float, int]] = []
    for number in range(_MOST_ROUNDS):
        if number >= _ROUNDS and best is not None:
            break
        found = round_network(model, teacher, prepared, request, images, progress)
        size, budget = file_bytes(model, found.spec), request.budget
        if budget is None:
            return _finished(model, found, request)
        if size <= budget and (best is None or size > best[0]):
            best = size, found, request, copy.deepcopy(model.state_dict())
            if size >= (1 - 3 * _SLACK) * budget or request.step <= SMALLEST_STEP:
                break
        tried.append((request.step, size))
        step = _next_step(tried, (1 - _SLACK) * budget, sum(t.numel() for t in matrices(model).values()))
        if any(abs(math.log2(step / before)) < _SAME for before, _ in tried):
            if best is not None:
                break
            # Of few weights the size does not always fall with the step: beyond the largest one it has to.
            step = max(before for before, _ in tried) * 2**_BEYOND
        request = StoreRequest("coded", step=step, budget=budget)
        load_tensors(model, start)
    if best is None:
        raise SharefoldError(f"store: {size:,} bytes instead of {request.budget:,}: allow more, or share more")
    _, found, request, state = best
    load_tensors(model, state)
    return _finished(model, found, request)


def _next_step(tried: list[tuple[float, int]], wanted: float, weights: int) -> float:
    """The step at which the file should have ``wanted`` bytes, after those in ``tried`` (step, bytes)."""
    step, size = tried[-1]
    # A bit less a weight is a factor of two of the step.
    slope = -weights / 8
    if len(tried) > 1:
        # Where most weights are zero already it is more; what two steps have shown tells how much.
        near = sorted(tried, key=lambda pair: abs(pair[1] - wanted))[:2]
        (step, size), (other, theirs) = near
        if other != step and (found := (size - theirs) / math.log2(step / other)) < 0:
            slope = max(found, 2 * slope)
    change = min(max((wanted - size) / slope, -MOST_OCTAVES), MOST_OCTAVES)
    return max(step * 2**change, SMALLEST_STEP)


def _material(
    model: nn.Module, calibration: Calibration | AnyInput | None, original: nn.Module | None, seed: int
) -> tuple[Input, nn.Module | None]:
    """The images, and the network that they are compared on."""
    if isinstance(calibration, Calibration):
        return calibration.fit_images, calibration.original if original is None else original
    return calibration_or_procedural(model, calibration, seed), original


def plan_store(
    model: nn.Module, budget_bytes: int, calibration: Calibration | AnyInput | None = None, seed: int = 0
) -> StoreRequest:
    """The request whose file is predicted to fit ``budget_bytes``: the step at which rounding to the nearest does.

    Steps of all rows follow from one number: an equal rise of the summed relative output errors for a bit more
    anywhere, so precision is mixed between layers, rows and columns.

    Raises:
        SharefoldError: even the coarsest rounding needs more.
    """
    images, _ = _material(model, calibration, None, seed)
    trial = copy.deepcopy(model).eval()
    dense = to_dense(trial).eval()
    prepared = prepare(dense, trial, analyze(dense, images[:1]), images)
    return _step_for(trial, prepared, StoreRequest("coded", budget=budget_bytes))


class TooFewBytes(SharefoldError):
    """A file of the network as it is takes more than the budget.

    Attributes:
        least: bytes, about, of the smallest one, in which names and scales alone are left.
    """

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"store: {budget:,} bytes cannot hold this network, of which a file has {least:,} at least: allow more")
        self.least = least


def _finished(model: nn.Module, found: RoundedNetwork, request: StoreRequest) -> StoreReport:
    carry_spec(model, found.spec)
    return StoreReport(found.spec, file_bytes(model, found.spec), request, found.sequential, found.positions)


def _step_for(model: nn.Module, prepared: Prepared, request: StoreRequest) -> StoreRequest:
    """About the smallest step at which rounding to the nearest gives a file of the budget."""
    from scipy.optimize import brentq  # a third of a second that loading a file does not need

    budget = request.budget
    assert budget is not None
    gains = gains_of(model, prepared.graph, matrices(model), plan_of(model))
    predicted = size_predictor(model, gains)

    @cache
    def excess(logarithm: float) -> int:
        return predicted(nearest(model, prepared, gains, math.exp(logarithm))) - budget

    low, high = math.log(SMALLEST_STEP), math.log(LARGEST_STEP)
    if excess(high) > 0:
        raise TooFewBytes(budget, budget + excess(high))
    found = low if excess(low) <= 0 else float(brentq(excess, low, high, xtol=STEP_TOLERANCE))
    while excess(found) > 0:
        found = min(found + STEP_TOLERANCE, high)
    return StoreRequest("coded", step=math.exp(found), budget=budget)
