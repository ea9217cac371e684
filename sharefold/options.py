"""What can be chosen beside the network, the budget and the images: frozen records; the command line's options come from them.

Every public verb takes one of these, or its fields by keyword: ``plan(model, "50%", images, exclude="fc")`` is
``plan(model, "50%", images, PlanOptions(exclude="fc"))``. Nothing here imports torch, so that the command line can ask first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from sharefold.budget import Effort
from sharefold.errors import SharefoldError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sharefold.inputs import Tensors

DEFAULT_OBJECTIVE = "fisher"
FIRST_BLOCK = ("shape", "stride", "skip")

Options = TypeVar("Options")
# Texts, or kinds by names of outputs; see sharefold/outputs/overrides.py.
Outputs: TypeAlias = "str | Sequence[str] | Mapping[str, str] | None"


def option(
    default: Any, text: str, metavar: str | None = None, *, alone: str | None = None, choices: tuple[str, ...] | None = None,
    switch: bool = False,
) -> Any:  # fmt: skip
    """A field that the command line has an option for.

    Args:
        text: what ``--help`` prints.
        metavar: what stands for its value there; N for a number from 1 on.
        alone: what the option means without a value.
        choices: the values that there are.
        switch: given or not, without a ``--no-`` form.
    """
    return field(
        default=default,
        metadata={"help": text, "metavar": metavar, "alone": alone, "choices": choices, "switch": switch},
    )


@dataclass(frozen=True)
class CalibrationOptions:
    """How a network is measured.

    Attributes:
        seed: of everything random, from the parts of the images to the sampled positions.
        example_input: (B, C, H, W) for tracing and for latency, or a tuple of tensors; by default one image of the calibration
            images.
        outputs: kinds of the network's outputs that would be read wrongly: ``"logits:axis=1"``, ``{"boxes": "regression"}``.
        criterion: (original's outputs, outputs) of a batch -> (n,), 0 where both say the same: compares whole networks.
        held_out: how many of the images should decide, and be reported on, each; by default about 15 %, and at most 30 %
            (:mod:`sharefold.calibration.parts`).
    """

    seed: int = 0
    example_input: Tensors | None = None
    outputs: Outputs = None
    criterion: Callable[[Any, Any], Tensor] | None = None
    held_out: int | None = None

    def __post_init__(self) -> None:
        check_whole("seed", self.seed)
        if self.held_out is not None:
            check_whole("held_out", self.held_out)


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
        repair: refit layer after layer, BatchNorm statistics, last layers; each repair is kept only where the divergence from
            the original falls on images that it did not see.
        refine: label-free distillation on the calibration images: epochs, a time such as ``"4m"``, or ``"auto"``; 0: none. By
            default the repairs end with a short one of small images (:mod:`sharefold.repair.brief`).
        config: entries of the saved configuration (``base``, ``pretrained_cfg``) that are known better than can be told from
            the network.
        seed, outputs, criterion: of a calibration that is made here.
    """

    repair: bool = option(True, "Repairs without labels: layer-by-layer refit, BatchNorm statistics, last layers.")
    refine: str | int | bool | Effort | None = option(
        None, "Distil on the calibration images: 20 (epochs), 4m, 0 (not at all).  [default: briefly, small images alone]",
        "EFFORT", alone="auto",
    )
    config: Mapping[str, Any] | None = None
    seed: int = 0
    outputs: Outputs = None
    criterion: Callable[[Any, Any], Tensor] | None = None


@dataclass(frozen=True)
class RoundOptions(CalibrationOptions):
    """How a converted network is measured when it is rounded, and what follows.

    Attributes:
        refine: the rounded network learns what it said before, without labels: epochs, a time such as ``"4m"``, or ``"auto"``.
    """

    refine: str | int | bool | Effort | None = option(
        None, "Learn on these images what rounding has changed: 20 (epochs), 4m.", "EFFORT", alone="auto"
    )


@dataclass(frozen=True)
class RefineOptions:
    """How long and how refinement runs.

    Attributes:
        epochs: passes over the images. With epochs alone the result depends on the seed only, and on whether the processor
            computes in bfloat16, which refinement then does where that is exact enough.
        seconds: wall-clock budget; the learning rate falls to 0 over it. With both, the one that ends first counts; with
            neither, 210 seconds or 100 epochs.
        batch_size: images a step; by default 64, fewer for large feature maps.
        blocks: names of the modules whose outputs are compared beside the logits; by default the blocks of the graph.
        step: largest relative change of a tensor a step (AdamW's rate is this times the tensor's own size, Muon's of matrices
            two fifths of it), for 64 images a step. It is smaller by the square root of the share where a step has fewer
            images, and where ``seconds`` allow fewer than 1,000 steps. By default it lies between .001 and .008, longer where
            there is more to mend.
        seed: of the order of the images and of their views.
    """

    epochs: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    blocks: tuple[str, ...] | None = None
    step: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("seed", self.seed)


@dataclass(frozen=True)
class GroupOptions:
    """Which layers count as isomorphic.

    Attributes:
        by_role: also tell roles apart (conv1 from conv2, expand from project).
        first_block: what becomes of the first block of a stage. "shape": nothing is left out, strides may differ; "stride":
            layers of different stride do not share; "skip": its layers are left out.
        min_members: smallest group to report.
        roles: only layers with one of these roles.
        kernel: only layers of this kernel size.
        include, exclude: regular expressions searched in layer names; a layer needs a match of ``include`` (if given) and
            none of ``exclude``.
    """

    by_role: bool = option(False, "Split groups by the layers' place in the block.", switch=True)
    first_block: str = option(
        "shape", "First layers of a stage: group by shape alone, apart when strided, or leave them out.", choices=FIRST_BLOCK
    )
    min_members: int = 2
    roles: Collection[str] | None = None
    kernel: int | tuple[int, int] | None = None
    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] | None = option(None, "Leave out layers whose name matches.", "REGEX")


@dataclass(frozen=True)
class OpenOptions:
    """What is known of a network beside its name or file.

    Attributes:
        arch: architecture of a checkpoint, ``NAME``, ``timm:NAME:k=v`` or ``tv:NAME:k=v``; found by names and shapes when
            left out. Of a network of the user's own, converted or not, ``FILE.py:FACTORY``: the Python file is run, and
            FACTORY, a class or function without arguments, builds the dense network.
        pretrained: published weights for named models; files are read in any case.
        num_classes: for named models, outputs of the classifier; for checkpoints with another count, the classifier is made
            anew and a warning says so.
        in_chans: channels of the input, for named models.
        trust_pickle: allow a checkpoint to run code.
    """

    arch: str | None = option(
        None, "Of a bare state dict: timm:NAME, tv:NAME; of your own network: FILE.py:FACTORY.  [default: matched]", "TEXT"
    )
    pretrained: bool = option(True, "Weights of a named source.")
    num_classes: int | None = option(None, "Classes of the last layer.", "N")
    in_chans: int | None = option(None, "Channels of the input, for a named source.", "N")
    trust_pickle: bool = option(False, "Run the code in a pickled checkpoint.", switch=True)


@dataclass(frozen=True)
class ExportOptions:
    """How a network is exported.

    Attributes:
        dynamic_batch: let the graph take any batch size; otherwise that of the example input.
        tolerance: largest difference of an output that passes, as a share of the largest number in it.
        store_codes: of ONNX: hold tensors that were rounded (``--store``, budgets in bytes) as their small integers.
        force: replace what is there.
    """

    dynamic_batch: bool = True
    store_codes: bool = option(False, "ONNX: hold rounded tensors as small integers.", switch=True)
    tolerance: float = option(1e-4, "Largest difference, as a share of the largest output.")
    force: bool = option(False, "Replace what is there.", switch=True)


@dataclass(frozen=True)
class RunOptions:
    """Where a fine-tuning run is kept.

    Attributes:
        out: where to save the result with :func:`sharefold.save`; None saves nothing.
        run_dir: folder for the run's state, log and curve; default ``<out>.run``. None without ``out``: no files.
        resume: go on with the run in ``run_dir``; begins a new one if there is none yet.
        force: overwrite ``out`` and a run left in ``run_dir``.
        quiet: show no progress.
        metrics: further entries for the saved model's card.
    """

    out: str | Path | None = None
    run_dir: str | Path | None = option(None, "State, log and curve.  [default: OUTPUT.run]", "PATH")
    resume: bool = option(False, "Go on with the run in the run folder, if there is one.", switch=True)
    force: bool = option(False, "Replace the output and a run left in the run folder.", switch=True)
    quiet: bool = False
    metrics: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class VerifyOptions:
    """How a file's claims are checked.

    Attributes:
        limit: so many of the images.
        batch_size: images at a time.
        device: where the networks run.
    """

    limit: int | None = option(None, "Only the first N images.", "N")
    batch_size: int = option(250, "Images a batch.", "N")
    device: str | torch.device = "cpu"


def check_whole(name: str, value: Any) -> None:
    """Checks a count or a seed.

    Raises:
        SharefoldError: it is no whole number from 0 to 2**63 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 1 << 63:
        raise SharefoldError(f"{name}={value!r}: must be a whole number from 0 to 2**63 - 1")


def chosen(options: Options | None, overrides: Mapping[str, Any], kind: type[Options]) -> Options:
    """``options``, or the defaults of ``kind``, with single fields replaced by keyword.

    Raises:
        TypeError: options of another kind; a keyword that ``kind`` has no field for: names the nearest.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for name in overrides:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"unexpected keyword {name!r}: {hint}")
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"options must be {kind.__name__}, not {type(options).__name__}")
    return replace(kind() if options is None else options, **overrides)  # type: ignore[type-var]
