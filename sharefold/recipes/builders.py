"""What a recipe is, and what its builders have in common: reading options, making tied groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sharefold.errors import SharefoldError
from sharefold.graph import Group, LayerRecord, NetworkGraph
from sharefold.layers import ConvForm, form_of
from sharefold.methods import method_named
from sharefold.plans import GroupPlan

Build = Callable[[nn.Module, NetworkGraph, dict[str, Any]], list[GroupPlan]]


@dataclass(frozen=True)
class Recipe:
    """A published system.

    Attributes:
        name: as in ``--recipe NAME``.
        paper: URL.
        options: name -> (default, what it means). The default's type is the option's type.
        build: (model, graph, options) -> group plans; raises SharefoldError when nothing in the network fits.
    """

    name: str
    paper: str
    options: Mapping[str, tuple[Any, str]]
    build: Build

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their types, defaults filled in.

        Raises:
            SharefoldError: unknown option, or a value of the wrong type.
        """
        values = {key: default for key, (default, _) in self.options.items()}
        for key, value in given.items():
            if key not in values:
                known = ", ".join(values) or "none"
                raise SharefoldError(f"recipe {self.name}: unknown option {key!r}: known are {known}")
            values[key] = self._typed(key, value, values[key])
        return values

    def _typed(self, key: str, value: Any, default: Any) -> Any:
        if not isinstance(default, int):
            return str(value)
        text = str(value)
        if isinstance(value, bool) or not text.lstrip("-").isdigit():
            raise SharefoldError(f"recipe {self.name}: {key}={value}: give a whole number")
        number = int(text)
        if number < 0:
            raise SharefoldError(f"recipe {self.name}: {key}={value}: give a number that is not negative")
        return number


def choice(recipe: str, key: str, value: str, allowed: Iterable[str]) -> str:
    """``value``, if it is allowed.

    Raises:
        SharefoldError: it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise SharefoldError(f"recipe {recipe}: {key}={value}: choose one of {', '.join(allowed)}")
    return value


def nothing_fits(recipe: str, what: str) -> SharefoldError:
    return SharefoldError(f"recipe {recipe}: nothing in this network fits: {what}")


def layer_form(model: nn.Module, name: str) -> ConvForm:
    form = form_of(model.get_submodule(name))
    if form is None:
        raise SharefoldError(f"layer {name} is no plain Conv2d or Linear: exclude it")
    return form


def plain(model: nn.Module, record: LayerRecord) -> bool:
    """Whether a shared layer can take the place of this convolution."""
    return record.kind == "conv2d" and form_of(model.get_submodule(record.name)) is not None


def square(record: LayerRecord, kernel: int | None = None) -> bool:
    """Whether an ungrouped convolution keeps resolution and width."""
    same = record.in_channels == record.out_channels and record.groups == 1 and set(record.stride) == {1}
    return same and (kernel is None or record.weight_shape[2:] == (kernel, kernel))


def tied_plan(model: nn.Module, graph: NetworkGraph, group: Group, share_bias: bool = False) -> GroupPlan:
    """One kernel for the group; with ``share_bias`` also one bias, where the layers have them."""
    forms = [layer_form(model, name) for name in group.members]
    biases = [graph.layers[name].bias for name in group.members]
    options: dict[str, Any] = {"bias": "shared"} if share_bias and all(biases) else {}
    before = sum(form.out_channels * form.features for form in forms)
    if options:
        before += sum(form.out_channels for form in forms)
    after = method_named("tied-kernels").cost(forms, options)
    return GroupPlan(group.name, "tied-kernels", group.members, options, before, after, None, group.stage, group.role)
