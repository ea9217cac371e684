"""One calibration: a dense network, the images that it is measured on, and all that was measured, each thing once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.calibration.images import calibration_or_procedural, warn_about
from sharefold.calibration.new_images import has_views, knows_mirrored, recognised, seen_before, stand_ins
from sharefold.calibration.parts import Parts, parts_of
from sharefold.calibration.statistics import Statistics, batch_for, statistics_of
from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph, analyze
from sharefold.inputs import AnyInput, Input, taken
from sharefold.layers.norm_fusion import FEW, fused_for_inference, norms_that_fuse
from sharefold.options import CalibrationOptions, chosen
from sharefold.outputs import Comparison, Divergence, OutputReading, read_outputs
from sharefold.outputs.comparison import BATCH
from sharefold.outputs.own_criterion import check_criterion
from sharefold.running import device_of, evaluating
from sharefold.settings import with_plain_settings

# Of fewer images a mean certainty says nothing of whether the network has seen them.
FEWEST_SEEN = 30
# Images by which it is told whether mirror images mean the same.
MIRRORED = 100


class Calibration:
    """What planning, converting, rounding and refining know of a network; made by :func:`calibrate`, read by all of them.

    Everything is measured on first use and kept. Nobody outside writes into it: the network is a copy, which stays dense.

    Attributes:
        original: the dense network, a copy in eval mode.
        images: (n, C, H, W) normalised, on the CPU; of a network of several inputs n of each (:class:`sharefold.inputs.Inputs`).
        parts: which of them are fitted to, which decide, and which the finished network is reported on.
        graph: :func:`sharefold.analyze` of the network.
        example: (B, C, H, W) for tracing and latency.
        seed: of everything random.
        outputs: the user's word on what the outputs are.
        criterion: of the user's own, in place of the divergence where whole networks are compared.
    """

    def __init__(
        self, original: nn.Module, images: Input, graph: NetworkGraph, example: Input, options: CalibrationOptions
    ) -> None:
        self.original, self.images, self.graph, self.example, self.options = original, images, graph, example, options
        self.seed, self.outputs, self.criterion = options.seed, options.outputs, options.criterion
        self.parts: Parts = parts_of(len(images), options.seed, options.held_out)
        self._solutions: dict[Hashable, Any] = {}

    @cached_property
    def statistics(self) -> Statistics:
        """Moments of the layers' inputs and what their outputs matter, on the part ``fit``; each collected when first needed."""
        return statistics_of(self.original, self.graph, self.images, self.seed, self.divergence, self.parts)

    @cached_property
    def reading(self) -> OutputReading:
        """What the network says: every output and its kind."""
        return read_outputs(self.original, self.images, self.graph, self.outputs)

    @cached_property
    def divergence(self) -> Divergence:
        """How conversions are compared with the network, output by output."""
        return Divergence.of(self.original, self.reading, self.images, batch_for(self.images))

    @cached_property
    def norms(self) -> Mapping[str, str | None]:
        """For every layer the norm that alone reads its output, or None; none at all where the network does not answer the same
        with its norms fused."""
        if not self.reading.leaves:
            return {}
        found = {name: record.norm for name, record in self.graph.layers.items()}
        images = self.images[self.parts.fit[:FEW]]
        return norms_that_fuse(self.original, found, lambda network: self.reading.run(network, images))

    @property
    def comparable(self) -> bool:
        """Whether there is anything by which a conversion can be compared with the network."""
        return self.reading.comparable or self.criterion is not None

    def comparison(self, images: Input, batch_size: int = BATCH) -> Comparison:
        """The network's answers to ``images`` (n, C, H, W), against which conversions are held.

        Raises:
            SharefoldError: there is nothing to compare.
        """
        return Comparison(
            self.original, images, self.reading, divergence=self.divergence, criterion=self.criterion, batch_size=batch_size,
            norms=self.norms,
        )  # fmt: skip

    @cached_property
    def decided(self) -> Comparison:
        """The comparison on :attr:`decide_views`."""
        return self.comparison(self.decide_views)

    @cached_property
    def reported(self) -> Comparison:
        """The comparison on :attr:`report_images`."""
        return self.comparison(self.report_images)

    @cached_property
    def stand_ins(self) -> Comparison:
        """The comparison on mild views of the images of the report, which stand for new images."""
        images = self.report_images
        assert isinstance(images, Tensor), "only one input has views"
        return self.comparison(stand_ins(images, self.seed, self.mirrors))

    @cached_property
    def has_views(self) -> bool:
        """Whether the images have random views: see :func:`sharefold.calibration.new_images.has_views`."""
        return has_views(self.original, self.images)

    @cached_property
    def mirrors(self) -> bool:
        """Whether mirror images mean the same, as far as the network tells that predicts one class an image: letters do not."""
        if not self.has_views or self.reading.classes is None or len(self.reading.leaves) != 1:
            return True
        images = self.decide_images[:MIRRORED]
        assert isinstance(images, Tensor), "only one input has views"
        return self._told(knows_mirrored, images)

    @cached_property
    def seen_before(self) -> bool:
        """Whether the network was trained on these images, as far as its certainty of classes tells."""
        return self._told(seen_before, self.report_images, self.stand_ins.images)

    @cached_property
    def views_are_known(self) -> bool:
        """Whether the network, which predicts one class an image, takes views of report images for what the images are."""
        return self._told(recognised, self.report_images, self.stand_ins.images)

    def _told(self, tell: Callable[..., bool], *images: Input) -> bool:
        """What ``tell`` finds out of the network, in eval mode with its norms fused, by these images."""
        with evaluating(self.original), fused_for_inference(self.original, norms=self.norms):
            return tell(self.original, *images, self.reading)

    @property
    def decide_images(self) -> Input:
        """Images (m, C, H, W) of the part ``decide``."""
        return self.images[self.parts.decide]

    @cached_property
    def decide_views(self) -> Input:
        """Images (2m, C, H, W) that decide on plans and repairs: :attr:`decide_images`, and a mild view of each.

        A network knows its training images nearly by heart, so that on a few of them a divergence is a matter of chance. Where it
        has seen these, two views of each are taken and the images themselves left out: on ResNet-20 at half its parameters the
        refit raises the divergence of training images by 23 % and lowers that of views by 14 % and of test images by 9 %.

        What has no views decides as it is.
        """
        plain = self.decide_images
        if not self.has_views:
            return plain
        assert isinstance(plain, Tensor)
        views = stand_ins(plain, self.seed, self.mirrors)
        enough = len(plain) >= FEWEST_SEEN and self.reading.classes is not None
        seen = enough and self._told(seen_before, plain, views)
        return views if seen else torch.cat([plain, views[: len(plain)]])

    @property
    def fit_images(self) -> Input:
        """Images (m, C, H, W) of the part ``fit``."""
        return self.images[self.parts.fit]

    @property
    def refit_images(self) -> Input:
        """Images of both parts: those of ``fit`` that the network is least certain of, then those of ``decide``."""
        return self.images[torch.cat([self.statistics.chosen, self.parts.decide])]

    @property
    def refit_parts(self) -> Parts:
        """Indices into :attr:`refit_images`."""
        fit, decide = len(self.statistics.chosen), len(self.parts.decide)
        index = torch.arange(fit + decide)
        return Parts(index[:fit], index[fit:], index[:0])

    @property
    def report_images(self) -> Input:
        """Images (m, C, H, W) of the part ``report``, perhaps none: for the figures of the finished network alone."""
        return self.images[self.parts.report]

    def solution(self, key: Hashable, solve: Callable[[], Any]) -> Any:
        """What ``solve`` gives, kept under ``key``: the planner's trials and the conversion solve every group once."""
        if key not in self._solutions:
            self._solutions[key] = solve()
        return self._solutions[key]

    def is_solved(self, key: Hashable) -> bool:
        """Whether :meth:`solution` knows ``key`` already."""
        return key in self._solutions

    def forget_solutions(self, but: Iterable[Hashable] = ()) -> None:
        """Frees all solutions whose keys are not among ``but``."""
        kept = set(but)
        self._solutions = {key: value for key, value in self._solutions.items() if key in kept}

    def of(self, network: nn.Module, graph: NetworkGraph | None = None) -> Calibration:
        """The same images for another network, of the same graph unless another is given; nothing measured carries over."""
        return Calibration(network, self.images, self.graph if graph is None else graph, self.example, self.options)

    def check_model(self, model: nn.Module) -> None:
        """Checks that ``model`` is the network that was calibrated, on the same device.

        Raises:
            SharefoldError: it is not; names the first tensor that differs.
        """
        ours, theirs = (_lasting(network) for network in (self.original, model))
        if device_of(model) != device_of(self.original):
            raise SharefoldError(
                f"calibration: it is on {device_of(self.original)}, the network on {device_of(model)}: calibrate it there"
            )
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs or not _same(ours[name], theirs[name]):
                raise SharefoldError(f"calibration: it is of another network ({name} differs): calibrate this one")


def _lasting(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and the statistics of norms. Into other buffers some networks write whenever they run."""
    statistics = (item for item in network.named_buffers() if item[0].endswith(("running_mean", "running_var")))
    return {**dict(network.named_parameters()), **dict(statistics)}


def _same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first, second) or torch.equal(first.nan_to_num(), second.nan_to_num())


@with_plain_settings
def calibrate(
    model: nn.Module, images: AnyInput | None = None, options: CalibrationOptions | None = None,
    graph: NetworkGraph | None = None, **overrides: Any,
) -> Calibration:  # fmt: skip
    """Prepares ``model`` for :func:`sharefold.plan`, :func:`sharefold.convert_` and the others, which share what is measured.

    Args:
        model: a dense network; not changed.
        images: (n, C, H, W) normalised images, or what else the network takes, no labels; for a network of several inputs a
            tuple of tensors (n, ...), in the order of ``forward``; or a loader or data set of either, of which the first 1,000
            samples are taken. By default procedural ones, of several inputs made after ``example_input``.
        options: see :class:`sharefold.options.CalibrationOptions`; its fields may be given by keyword.
        graph: of ``model``, where it is at hand.

    Raises:
        SharefoldError: images that the network cannot take, a network that cannot be copied or run, a criterion that is not 0
            where both networks say the same.
    """
    wanted = chosen(options, overrides, CalibrationOptions)
    given = None if wanted.example_input is None else taken(wanted.example_input, "example_input")
    found = calibration_or_procedural(model, images, wanted.seed, given)
    example = found[:1] if given is None else given
    if graph is None:
        graph = analyze(model, example)
    made = Calibration(copied(model).eval(), found, graph, example, wanted)
    warn_about(found, reported=len(made.parts.report) > 0)
    if wanted.outputs is not None:
        made.reading  # noqa: B018  what the user says is checked before work starts
    if wanted.criterion is not None:
        check_criterion(wanted.criterion, made.original, found)
    return made


def calibration_of(model: nn.Module, given: Calibration | AnyInput | None, options: CalibrationOptions) -> Calibration:
    """``given`` after a check that it is of ``model``, or a calibration on the images ``given``, or on procedural ones.

    Raises:
        SharefoldError: as :func:`calibrate` and :meth:`Calibration.check_model`; outputs, a criterion or another seed beside a
            calibration.
    """
    if isinstance(given, Calibration):
        if options.outputs is not None or options.criterion is not None:
            raise SharefoldError("outputs, criterion: the calibration has its own: give them to calibrate")
        if options.seed not in (CalibrationOptions.seed, given.seed):
            raise SharefoldError(f"seed={options.seed!r}: the calibration has its own, {given.seed}: give it to calibrate")
        given.check_model(model)
        return given
    return calibrate(model, given, options)


def copied(model: nn.Module) -> nn.Module:
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
