"""What a method is: candidates for a group, a solution in tensors, and the layers that hold it.

A :class:`ConversionStep` changes a group of layers or blocks as a plan says. A :class:`LayerSwap` is one that puts a shared layer
in the place of each; a :class:`LayerMethod` one of these that the planner can choose, since it can also say what it would cost
and spoil.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sharefold.calibration.problem import GroupProblem
from sharefold.calibration.ragged import can_share, problem_for
from sharefold.calibration.statistics import Statistics
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.layers import Bank, ConvForm, SharedConv, add_bank, carry, checked_form, replace_modules
from sharefold.plans import GroupPlan

# Beyond this filter length an alternation takes seconds.
LARGE_FEATURES = 640


@dataclass(frozen=True)
class Candidate:
    """One way to treat a group: options, what it costs and the error it is expected to leave.

    ``cost`` is in parameters; integer codes count as their bits over 32. ``errors`` (K,) are relative data-norm
    errors of the members.
    """

    options: dict[str, Any]
    cost: float
    errors: Tensor


@dataclass
class Solution:
    """Tensors of a solved group: the bank's by name, and per member its own by constructor argument."""

    bank: dict[str, Tensor]
    members: list[dict[str, Tensor]]
    errors: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)


class ConversionStep(ABC):
    """One way to change a group of layers or blocks: what a plan's group names. One subclass a file, listed in the registry.

    ``convert_`` calls :meth:`check`, :meth:`align`, :meth:`fit`, :meth:`install` and :meth:`finish` in this order, loading calls
    :meth:`check` and :meth:`install`, :func:`sharefold.expand` calls :meth:`expand`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    smallest_group: ClassVar[int] = 2
    option_names: ClassVar[frozenset[str]] = frozenset()  # all that a plan's group may set
    writes_norms: ClassVar[bool] = False  # whether the norms behind its layers take up what the step changes

    @abstractmethod
    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        """Checks that the members can take this step with these options.

        Raises:
            SharefoldError: a member cannot be converted, members do not match, or options do not fit.
        """

    def layers(self, graph: NetworkGraph, plan: GroupPlan) -> tuple[str, ...]:
        """The layers whose input moments :meth:`align` and :meth:`fit` will ask for."""
        return plan.members

    def align(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> bool:
        """Reorders channels of the dense ``model`` so that its function stays and the members agree more.

        Returns:
            Whether the model was changed; statistics taken before do not hold then.
        """
        return False

    def may_align(self) -> bool:
        """Whether :meth:`align` may change the network at all."""
        return type(self).align is not ConversionStep.align

    @abstractmethod
    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        """The best tensors for the plan's members in the dense ``model``."""

    @abstractmethod
    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        """Swaps the members of ``plan`` in ``model``; without a solution the tensors are left unset."""

    def finish(self, model: nn.Module, graph: NetworkGraph, plan: GroupPlan) -> None:
        """Last changes to the converted ``model``, after the means were absorbed."""

    def expand(self, model: nn.Module, plan: GroupPlan) -> None:
        """Puts dense modules back where this step left something else than shared layers.

        Raises:
            SharefoldError: the result has no dense twin.
        """


class LayerSwap(ConversionStep):
    """A step whose members are single layers, each replaced by a shared layer that reads the group's bank."""

    takes_ragged: ClassVar[bool] = False  # members may differ in their numbers of channels (calibration/ragged.py)
    takes_groups: ClassVar[bool] = True  # grouped convolutions, depthwise ones among them
    takes_frames: ClassVar[bool] = False  # can solve problems in a space of fewer dimensions than the layer's features

    @abstractmethod
    def solve(self, problem: GroupProblem, options: dict[str, Any]) -> Solution:
        """The best tensors for these options."""

    @abstractmethod
    def blank(self, forms: list[ConvForm], options: dict[str, Any]) -> Solution:
        """Tensors of the right shapes and no particular values, to be filled from a checkpoint."""

    @abstractmethod
    def member(
        self, form: ConvForm, bank: Bank | None, tensors: dict[str, Tensor], kept: dict[str, Tensor]
    ) -> SharedConv:
        """The layer that stands in for one member; ``kept`` are the bias and gain that the dense layer had."""

    def largest(self, forms: list[ConvForm]) -> dict[str, int]:
        """For every option that counts something, the largest value that makes sense for these layers."""
        return {}

    def fits(self, forms: list[ConvForm], options: dict[str, Any]) -> bool:
        """Whether every counting option lies between 1 and its largest value."""
        return all(
            isinstance(options[key], int) and not isinstance(options[key], bool) and 1 <= options[key] <= most
            for key, most in self.largest(forms).items()
        )

    def cost(self, forms: list[ConvForm], options: dict[str, Any]) -> int:
        """Parameters of bank and members together."""
        with torch.device("meta"):
            blank = self.blank(forms, options)
        tensors = [*blank.bank.values(), *(t for member in blank.members for t in member.values())]
        return sum(t.numel() for t in tensors if t.is_floating_point())

    def check(self, model: nn.Module, plan: GroupPlan) -> None:
        forms = [checked_form(name, model.get_submodule(name)) for name in plan.members]
        equal = not (self.takes_ragged and can_share(forms))
        for name, form in zip(plan.members, forms, strict=True):
            if equal and (form.weight_shape, form.groups) != (forms[0].weight_shape, forms[0].groups):
                raise SharefoldError(
                    f"plan: group {plan.name!r}: {name} has weight {form.weight_shape} and {plan.members[0]} "
                    f"{forms[0].weight_shape}: members of a group must be isomorphic"
                )
        if forms and forms[0].groups > 1 and not self.takes_groups:
            raise SharefoldError(
                f"plan: group {plan.name!r}: {plan.members[0]} is a grouped convolution, which method {self.name} does not take: "
                "take basis or hybrid"
            )
        try:
            if not self.fits(forms, plan.options):
                ranges = ", ".join(f"{key} an integer from 1 to {most}" for key, most in self.largest(forms).items())
                raise ValueError(f"must be {ranges}")
            self.cost(forms, plan.options)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise SharefoldError(
                f"plan: group {plan.name!r}: options {plan.options} do not fit method {self.name}: {reason}"
            ) from None

    def fit(self, model: nn.Module, graph: NetworkGraph, statistics: Statistics, plan: GroupPlan) -> Solution:
        problem = problem_for(model, graph, plan.members, statistics)
        if isinstance(problem, GroupProblem) and problem.frames is not None and not self.takes_frames:
            raise SharefoldError(
                f"plan: group {plan.name!r}: {plan.members[0]} has {problem.forms[0].features:,} inputs an output, too many "
                f"for method {self.name}: take svd"
            )
        return self.solve(problem, plan.options)  # type: ignore[arg-type]  # ragged ones for methods that take them alone

    def install(self, model: nn.Module, plan: GroupPlan, solution: Solution | None) -> None:
        layers = [model.get_submodule(name) for name in plan.members]
        forms = [checked_form(name, layer) for name, layer in zip(plan.members, layers, strict=True)]
        first = next(layers[0].parameters())
        if solution is None:
            with first.device:
                solution = self.blank(forms, plan.options)
        bank = None
        if solution.bank:
            bank = add_bank(model, plan.name, Bank(_like(first, solution.bank), uses=len(layers)))
            bank.stage = plan.stage
        members: dict[str, nn.Module] = {}
        for name, layer, form, own in zip(plan.members, layers, forms, solution.members, strict=True):
            kept = {key: value for key in ("bias", "gain") if (value := getattr(layer, key, None)) is not None}
            members[name] = self.member(form, bank, _like(first, own), kept)
            carry(layer, members[name])
        replace_modules(model, members)


class LayerMethod(LayerSwap):
    """A swap that the planner can choose, and ``--method`` offers: it says what it could make of a group and what that costs."""

    @abstractmethod
    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        """Ways to treat this group, of growing cost; none where the method does not apply."""

    def without_pivots(self) -> LayerMethod:
        """The same method with candidates that keep whole factors (:class:`sharefold.methods.two_factors.TwoFactors`)."""
        return self

    def stand_in(self, form: ConvForm, options: dict[str, Any]) -> SharedConv:
        """One member with unset tensors, on the current default device: for its costs at run time."""
        blank = self.blank([form], options)
        return self.member(form, Bank(blank.bank, uses=1) if blank.bank else None, blank.members[0], {})


def _like(first: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the device of ``first``, floating ones in its dtype; contiguous, as they will be when read from a file."""
    return {
        key: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype).clone(
            memory_format=torch.contiguous_format
        )
        for key, t in tensors.items()
    }


def curve_effort(features: int) -> dict[str, Any]:
    """How exactly error curves are computed: iterations, and at how many ranks; none of them for large kernels.

    A curve only has to rank candidates; what is chosen is solved in full later.
    """
    return {"iterations": 5, "solved": 4} if features <= LARGE_FEATURES else {}


def solve_effort(features: int) -> dict[str, Any]:
    """Most iterations of a solution: an iteration costs the square of ``features``, and the first gain most."""
    return {} if features <= LARGE_FEATURES else {"iterations": 8}


def rank_grid(largest: int, points: int = 16, smallest: int = 1) -> list[int]:
    """Ranks from ``smallest`` to ``largest``, spaced evenly in the logarithm, without repeats."""
    if largest < smallest:
        return []
    steps = torch.logspace(
        torch.log10(torch.tensor(float(smallest))).item(), torch.log10(torch.tensor(float(largest))).item(), points
    )
    return sorted({round(float(step)) for step in steps})
