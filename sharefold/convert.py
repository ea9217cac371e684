"""Carries out a plan: solves every group, swaps the layers, and repairs without labels."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.architectures.bases import base_of
from sharefold.budget import Effort, parse_effort
from sharefold.calibration.images import calibration_or_procedural, input_config
from sharefold.calibration.statistics import Statistics, statistics_of
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.format import FileConfig, carry_config
from sharefold.graph import NetworkGraph, analyze
from sharefold.layers import Bank, shared_layers
from sharefold.layers.bank import bank_key
from sharefold.measure import agreement, gives_logits
from sharefold.methods import Solution, method_named
from sharefold.methods.solved import is_solved, solution_of
from sharefold.plans import GroupPlan, Plan, Progress
from sharefold.repair.batchnorm_statistics import reestimate_norms
from sharefold.repair.classifier import refit_head
from sharefold.repair.means import absorb_means
from sharefold.repair.refine import refine as run_refine
from sharefold.repair.refit import refit
from sharefold.repair.views import blended
from sharefold.settings import with_plain_settings
from sharefold.store import parse_store, quantize_
from sharefold.store.tensor_spec import carry_spec

# In the order in which they run.
REPAIRS = ("refit", "norms", "head")


@dataclass
class Conversion:
    """What ``convert_`` did.

    Attributes:
        plan: the plan as carried out, with measured errors and resolved options.
        original: the dense network, a copy; the teacher of any fine-tuning.
        agreement: share of held-out calibration images on which both networks' top-1 agree; None for networks that
            return no logits (detectors).
        kl: mean KL(original || converted) on them, nats; None likewise.
        steps: the repairs that ran and whether they were kept.
        seconds: wall-clock seconds of each step.
    """

    plan: Plan
    original: nn.Module
    agreement: float | None
    kl: float | None
    steps: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


@with_plain_settings
def convert_(
    model: nn.Module, plan: Plan, *, calibration: Tensor | None = None, example_input: Tensor | None = None,
    repair: bool = True, refine: str | int | bool | Effort | None = None,
    statistics: Statistics | None = None, graph: NetworkGraph | None = None, config: dict[str, Any] | None = None,
    seed: int = 0, progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """Converts ``model`` in place as ``plan`` says and returns what was done.

    Args:
        model: the dense network that the plan was made for.
        plan: from :func:`sharefold.plan`, a recipe, or :meth:`Plan.from_json`.
        calibration: (n, C, H, W) normalised images, no labels; by default procedural images.
        repair: refit coefficients, BatchNorms and classifier on the converted prefix; each is kept only where the KL on
            held-out images and blends of them falls. Where nothing is shared there is nothing to repair or refine.
        refine: label-free distillation on the calibration images: epochs, a time such as ``"4m"``, or ``"auto"``.
        statistics, graph: of ``model`` while dense; reused when given, so that planning and solving share one pass.
        config: entries of the saved configuration (``base``, ``pretrained_cfg``) known better than :func:`describe` can.

    Raises:
        SharefoldError: the plan does not fit the model, or refinement is asked of a network that returns no logits; the
            model is then unchanged. Also where the plan's store cannot hold the network: that shows only once it is
            converted, and converted it stays.

    Warns:
        SharefoldWarning: refinement is asked for and nothing was shared.
    """
    seconds: dict[str, float] = {}
    effort = parse_effort(refine)
    images = calibration_or_procedural(model, calibration, seed) if statistics is None else statistics.images
    check_plan(model, plan)
    if graph is None:
        graph = analyze(model, images[:1] if example_input is None else example_input)
    original = _copied(model).eval()
    compared = gives_logits(original, images[:2])
    if effort is not None and not compared:
        raise SharefoldError("refine: this network returns no logits to learn from (a detector?): convert without it")
    if statistics is None:
        statistics = statistics_of(original, graph, images, seed)
    elif statistics.model is model:
        # `model` is about to change, and its copy too where channels are reordered.
        statistics.model = copy.deepcopy(original) if any(method_named(g.method).may_align() for g in plan.groups) else original

    _check_layers(graph, plan)
    start = time.perf_counter()
    if _align(original, graph, plan, statistics):
        model.load_state_dict(original.state_dict())
        statistics = statistics_of(original, graph, images, seed)
    solutions = _solve(original, graph, plan, statistics, progress)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    seconds["solve"] = time.perf_counter() - start
    groups = []
    for group, solution in zip(plan.groups, solutions, strict=True):
        method_named(group.method).install(model, group, solution)
        groups.append(_measured(group, solution))
    _freeze(model, frozen)
    absorb_means(original, model, graph, statistics.means)
    for group in plan.groups:
        method_named(group.method).finish(model, graph, group)
    done = replace(plan, groups=groups, params_after=sum(p.numel() for p in model.parameters()))

    carry_config(model, describe(original, done, config))
    carry_spec(model, None)

    held, rest = split_indices(len(images))
    held_out, fitting = images[held], images[rest]
    deciding = with_blends(held_out, seed)
    steps: dict[str, Any] = {}
    reason = None if plan.groups else "nothing was shared, so that there is nothing to repair or refine"
    if not compared:
        reason = "the network returns no logits to decide by"
    if reason:
        wanted = (REPAIRS if repair else ()) + (("refine",) if effort else ())
        if effort:
            warnings.warn(f"not refined: {reason}", SharefoldWarning, stacklevel=3)
        steps |= {name: {"kept": False, "reason": reason} for name in wanted}
    elif repair:
        start = time.perf_counter()
        telling = images[rest[torch.isin(rest, statistics.chosen)]]
        steps["refit"] = refit(original, model, graph, telling, deciding, plan.groups, progress=progress)
        steps["norms"] = reestimate_norms(original, model, fitting, deciding, before=_kl_so_far(steps))
        steps["head"] = refit_head(original, model, fitting, deciding, before=_kl_so_far(steps))
        seconds["repair"] = time.perf_counter() - start
    if effort is not None and not reason:
        start = time.perf_counter()
        steps["refine"] = run_refine(
            original, model, fitting, deciding, epochs=effort.epochs, seconds=effort.seconds, graph=graph,
            seed=seed, progress=progress, before=_kl_so_far(steps),
        )  # fmt: skip
        seconds["refine"] = time.perf_counter() - start
    if plan.store:
        start = time.perf_counter()
        quantize_(model, plan.store, calibration=images, original=original, seed=seed, progress=progress)
        seconds["store"] = time.perf_counter() - start
    found = agreement(original, model, held_out) if compared else None
    return Conversion(done, original, found and found.top1, found and found.kl, steps, seconds)


def _kl_so_far(steps: Mapping[str, Mapping[str, Any]]) -> float | None:
    """KL of the network that the repairs left, on the images that decide; None when none of them measured it."""
    measured = [step["kl_after" if step["kept"] else "kl_before"] for step in steps.values() if "kl_before" in step]
    return measured[-1] if measured else None


def describe(original: nn.Module, plan: Plan, known: Mapping[str, Any] | None = None) -> FileConfig:
    """What ``save`` needs to know: how to build the dense architecture, how it wants its images, and the plan.

    ``base`` is what :func:`sharefold.open_source` noted on the model, or the registered architecture that its names
    and shapes identify; None for a network of the user's own, which ``load`` then asks for. Entries in ``known`` are
    taken over and not looked for.
    """
    known = known or {}
    base = known["base"] if "base" in known else base_of(original)
    return FileConfig(plan, base or None, known["pretrained_cfg"] if "pretrained_cfg" in known else input_config(original))


def split_held_out(images: Tensor) -> tuple[Tensor, Tensor]:
    """(held out, for fitting) of ``images`` (n, C, H, W); see :func:`split_indices`."""
    held, rest = split_indices(len(images))
    return images[held], images[rest]


def split_indices(count: int, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Indices (held out, for fitting): every fifth is held out, so both see all of an ordered set; fewer than five are both."""
    index = torch.arange(count)
    if count < 5:
        return index, index
    held = index % round(1 / share) == 0
    return index[held], index[~held]


def with_blends(held_out: Tensor, seed: int = 0) -> Tensor:
    """Images (2n, C, H, W) that decide on repairs: ``held_out`` (n, C, H, W), and each with another one blended in.

    A network knows its training images nearly by heart, so that on a few of them KL is a matter of chance. Of blends it
    is not certain, and they tell its conversions apart as new images do.
    """
    return torch.cat([held_out, blended(held_out, torch.Generator().manual_seed(seed))])


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Checks that every member exists, is dense, that the members of a group are isomorphic, and the stored types.

    Raises:
        SharefoldError: names the group and the layer.
    """
    if plan.store:
        parse_store(plan.store)
    keys: dict[str, str] = {}
    for group in plan.groups:
        method = method_named(group.method)
        if (other := keys.setdefault(bank_key(group.name), group.name)) != group.name:
            raise SharefoldError(f"plan: groups {other!r} and {group.name!r} differ in dots alone: rename one")
        for name in group.members:
            try:
                model.get_submodule(name)
            except AttributeError:
                raise SharefoldError(
                    f"plan: group {group.name!r} names layer {name!r}, which this model does not have: "
                    "was the plan made for another model?"
                ) from None
        method.check(model, group)


def _check_layers(graph: NetworkGraph, plan: Plan) -> None:
    for group in plan.groups:
        for name in method_named(group.method).layers(graph, group):
            if name not in graph.layers:
                reason = graph.skipped.get(name, "it is not a convertible layer")
                raise SharefoldError(f"plan: layer {name!r} of group {group.name!r} cannot be converted: {reason}")


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        SharefoldError: torch cannot make one.
    """
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise SharefoldError(
            f"the network cannot be copied ({reason}): remove old-style weight norm, spectral norm and pruning, and tensors that "
            "its modules hold from a run with gradients"
        ) from None


def _freeze(model: nn.Module, frozen: set[str]) -> None:
    """What replaces frozen parameters is frozen, a bank where all that it replaces was."""
    readers: dict[Bank, list[bool]] = {}
    for name, layer in shared_layers(model).items() if frozen else ():
        still = f"{name}.weight" in frozen
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(f"{name}.bias" not in frozen if key == "own_bias" else not still)
        if layer.bank is not None:
            readers.setdefault(layer.bank, []).append(still)
    for bank, flags in readers.items():
        bank.requires_grad_(not all(flags))


def _align(original: nn.Module, graph: NetworkGraph, plan: Plan, statistics: Statistics) -> bool:
    """Lets every group reorder channels of the dense network; whether any did."""
    return any([method_named(group.method).align(original, graph, statistics, group) for group in plan.groups])


def _solve(
    original: nn.Module, graph: NetworkGraph, plan: Plan, statistics: Statistics, progress: Progress | None
) -> list[Solution]:
    layers = {group.name: method_named(group.method).layers(graph, group) for group in plan.groups}
    solutions: list[Solution] = []
    for run in statistics.batches([layers[group.name] for group in plan.groups]):
        needed = [plan.groups[index] for index in run if not is_solved(statistics, plan.groups[index])]
        statistics.moments([name for group in needed for name in layers[group.name]])
        for index in run:
            solutions.append(solution_of(original, graph, statistics, plan.groups[index]))
            if progress:
                progress("solving", len(solutions), len(plan.groups))
    return solutions


def _measured(group: GroupPlan, solution: Solution) -> GroupPlan:
    error = None if solution.errors is None else float(solution.errors.mean())
    return replace(group, error=error, options={**group.options, **solution.options})
