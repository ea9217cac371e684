"""Whether a plan fits a network, asked before anything of it is touched."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.layers import bank_key, is_bank_name
from sharefold.methods.narrowing import blank_narrowed
from sharefold.methods.registry import step_named
from sharefold.plans import NARROWING, Plan
from sharefold.untrusted import quoted


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Checks that every member exists, is dense, and that the members of a group are isomorphic.

    Raises:
        SharefoldError: names the group and the layer.
    """
    keys: dict[str, str] = {}
    dense = model
    for group in (*plan.narrowing, *plan.sharing):
        if dense is model and group.method not in NARROWING:
            model = blank_narrowed(dense, plan)
        step = step_named(group.method)
        if not is_bank_name(group.name):
            raise SharefoldError(f"plan: a group cannot be named {quoted(group.name)}, as torch has it taken: rename it")
        if (other := keys.setdefault(bank_key(group.name), group.name)) != group.name:
            raise SharefoldError(f"plan: groups {quoted(other)} and {quoted(group.name)} differ in dots alone: rename one")
        for name in group.members:
            if plan.protects(name):
                raise SharefoldError(
                    f"plan: group {quoted(group.name)} names layer {quoted(name)}, which exclude {quoted(plan.exclude)} "
                    "protects: take it out of one of them"
                )
            try:
                model.get_submodule(name)
            except AttributeError:
                raise SharefoldError(
                    f"plan: group {quoted(group.name)} names layer {quoted(name)}, which this model does not have: "
                    "was the plan made for another model?"
                ) from None
        step.check(model, group)


def check_options(plan: Plan) -> None:
    """Checks that every group's method knows the options that the group sets: a misspelt one would be left out without a word.

    Not asked of files, which an older sharefold may have written.

    Raises:
        SharefoldError: names the group and the option.
    """
    for group in plan.groups:
        known = step_named(group.method).option_names
        for name in group.options.keys() - known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known)) or 'none'}"
            raise SharefoldError(f"plan: group {quoted(group.name)}: {group.method} has no option {quoted(name)}: {hint}")


def check_layers(graph: NetworkGraph, plan: Plan) -> None:
    """Checks that the graph pass found every layer that the plan changes, and that norms which take up a change may.

    Raises:
        SharefoldError: names the layer and the reason why it cannot be converted.
    """
    for group in plan.groups:
        step = step_named(group.method)
        for name in step.layers(graph, group):
            if name not in graph.layers:
                reason = graph.skipped.get(name, "it is not a convertible layer")
                raise SharefoldError(f"plan: layer {quoted(name)} of group {quoted(group.name)} cannot be converted: {reason}")
            norm = graph.layers[name].norm
            if step.writes_norms and norm is not None and plan.protects(norm):
                raise SharefoldError(
                    f"plan: group {quoted(group.name)}: {group.method} writes into {quoted(norm)}, the norm behind "
                    f"{quoted(name)}, which exclude {quoted(plan.exclude)} protects: take the layer out of the group, or the "
                    "norm out of exclude"
                )


def check_written(model: nn.Module, graph: NetworkGraph, plan: Plan) -> None:
    """All that is checked of a plan that somebody hands over: :func:`check_plan`, :func:`check_options`, :func:`check_layers`.

    Raises:
        SharefoldError: as these.
    """
    check_plan(model, plan)
    check_options(plan)
    check_layers(graph, plan)
