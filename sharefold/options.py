"""What can be chosen beside the network, the budget and the images: frozen records; the command line's options come from them.

Every public verb takes one of these, or its fields by keyword: ``plan(model, "50%", images, exclude="fc")`` is
``plan(model, "50%", images, PlanOptions(exclude="fc"))``. Nothing here imports torch, so that the command line can ask first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sharefold.budget import Effort

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_OBJECTIVE = "fisher"

Options = TypeVar("Options")
# Texts, or kinds by names of outputs; see sharefold/outputs/overrides.py.
Outputs: TypeAlias = "str | Sequence[str] | Mapping[str, str] | None"


def option(default: Any, text: str, metavar: str | None = None, alone: str | None = None) -> Any:
    """A field, with the text that ``--help`` prints, what stands for its value there, and what the option means without one."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "alone": alone})


@dataclass(frozen=True)
class CalibrationOptions:
    """How a network is measured.

    Attributes:
        seed: of everything random, from the parts of the images to the sampled positions.
        example_input: (B, C, H, W) for tracing and for latency, by default one image of the calibration images.
        outputs: what the network's outputs are, where it is told wrongly: ``"logits:axis=1"``, ``{"boxes": "regression"}``.
        criterion: (original's outputs, outputs) of a batch -> (n,), 0 where both say the same: compares whole networks.
        held_out: how many of the images should decide, and be reported on, each; by default about 15 %, and at most 30 %
            (:mod:`sharefold.calibration.parts`).
    """

    seed: int = 0
    example_input: Tensor | None = None
    outputs: Outputs = None
    criterion: Callable[[Any, Any], Tensor] | None = None
    held_out: int | None = None


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may hold.

    Attributes:
        method: ``"auto"``, a method's name, or several.
        exclude: regular expression; layers whose name it matches stay as they are.
        objective: what is kept small: the layers' relative errors, each times a factor (``"fisher"``, ``"kl"``, ``"error"``:
            ``sharefold/planner/objectives.py``), or the whole network's output divergence before repairs (``"joint"``).
        pivots: whether factors are stored by interpolative decomposition (:mod:`sharefold.solvers.interpolative`); without,
            they are whole and orthonormal. Budgets in bytes have whole ones.
        round_channels: what method fold leaves of a layer's channels is a multiple of this, as hardware likes it.
        seed, outputs, criterion: of a calibration that is made here.
    """

    method: str | tuple[str, ...] = option("auto", "auto, or a method, or several: basis,svd.", "NAME")
    exclude: str | None = option(None, "Keep layers whose name matches.", "REGEX")
    objective: str = option(DEFAULT_OBJECTIVE, "What the plan keeps small: fisher, joint, kl, error.", "NAME")
    pivots: bool = option(True, "Store factors by interpolative decomposition: fewer numbers, the same network.")
    round_channels: int = option(1, "Fold to multiples of so many channels.", "N")
    seed: int = 0
    outputs: Outputs = None
    criterion: Callable[[Any, Any], Tensor] | None = None


@dataclass(frozen=True)
class ConvertOptions:
    """What happens beside the plan itself.

    Attributes:
        repair: coefficients, BatchNorm statistics and the classifier are fitted again on the converted prefix; each is kept
            only where the divergence from the original falls on images that the fit did not see.
        refine: label-free distillation on the calibration images: epochs, a time such as ``"4m"``, or ``"auto"``.
        config: entries of the saved configuration (``base``, ``pretrained_cfg``) that are known better than can be told from
            the network.
        seed, outputs, criterion: of a calibration that is made here.
    """

    repair: bool = option(True, "Refit coefficients, BatchNorm statistics and the classifier on the converted prefix.")
    refine: str | int | bool | Effort | None = option(
        None, "Distil on the calibration images: 20 (epochs), 4m.", "EFFORT", alone="auto"
    )
    config: Mapping[str, Any] | None = None
    seed: int = 0
    outputs: Outputs = None
    criterion: Callable[[Any, Any], Tensor] | None = None


@dataclass(frozen=True)
class RefineOptions:
    """How long and how refinement runs.

    Attributes:
        epochs: passes over the images. With epochs alone the result depends on the seed only.
        seconds: wall-clock budget; the learning rate falls to 0 over it. With both, the one that ends first counts; with
            neither, 210 seconds or 100 epochs.
        batch_size: images a step; by default 64, fewer for large feature maps.
        blocks: names of the modules whose outputs are compared beside the logits; by default the blocks of the graph.
        step: largest relative change of a tensor a step (AdamW's rate is this times the tensor's own size).
        seed: of the order of the images and of their views.
    """

    epochs: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    blocks: tuple[str, ...] | None = None
    step: float = 0.004
    seed: int = 0


def chosen(options: Options | None, overrides: Mapping[str, Any], kind: type[Options]) -> Options:
    """``options``, or the defaults of ``kind``, with single fields replaced by keyword.

    Raises:
        TypeError: a keyword that ``kind`` has no field for; names the nearest.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in overrides:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"unexpected keyword {name!r}: {hint}")
    return replace(kind() if options is None else options, **overrides)  # type: ignore[type-var]
