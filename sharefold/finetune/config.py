"""Everything fine-tuning can be told, in one dataclass; the command line is generated from it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Any

from sharefold.errors import SharefoldError
from sharefold.options import option

# The largest number of float32, in which all of this is computed.
UNLIMITED = 3.4e38


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of one run. The defaults are those that measured best for a converted network and its teacher.

    Batches are counted over all processes: a run on two processes sees the same global batches as a run on one.
    Fractions are of 1, times in minutes, learning rates those of the whole batch (nothing is scaled behind the back).
    """

    epochs: int = option(10, "Passes over the training images.")
    batch_size: int = option(128, "Images an update sees, over all processes.")
    accumulate: int = option(1, "Slices a batch is computed in (memory goes down, the result stays).")
    seed: int = option(0, "Seed of order, augmentation and dropout.")

    # loss
    labels: bool = option(True, "Use labels; without them distillation is the whole loss.")
    distill: float = option(0.9, "Weight a of the teacher's outputs; the labels get 1 - a.")
    temperature: float = option(4.0, "Temperature T of distillation.")
    block_match: float = option(0.0, "Weight b of the normalised squared error of block outputs.")
    block_names: str = option("auto", "Blocks to match: auto, or a regular expression over module names.")
    label_smoothing: float = option(0.0, "Label smoothing.")
    orthogonality: float = option(10.0, "Lambda of the banks' mean squared deviation from orthonormal rows.")
    orthogonality_form: str = option("mean", "Which rows are averaged together.", choices=("mean", "separate", "with-unique"))
    orthogonality_joint: bool = option(False, "Treat the banks of one stage as one matrix (cross terms count).")
    orthogonality_skip: str = option("", "Regular expression of bank names left out of the orthogonality term.")

    # optimizer and schedule
    optimizer: str = option("adamw", "Any optimizer of timm.optim.")
    lr: float = option(1e-3, "Peak learning rate.")
    momentum: float = option(0.9, "Momentum, where the optimizer has one.")
    eps: float = option(0.0, "The optimizer's eps; 0 keeps its own default.")
    weight_decay: float = option(0.01, "Weight decay.")
    decay: str = option("filters", "What decays: filters (no coefficient, norm or bias) or all.", choices=("filters", "all"))
    bank_step: str = option("auto", "Step of a bank used K times: auto (1/K for SGD, else 1), or a number, or 1/K.")
    schedule: str = option(
        "cosine", "Learning rate over time.", choices=("cosine", "constant", "multistep", "exponential", "cyclical")
    )
    warmup_epochs: float = option(0.5, "Epochs of linear warm-up.")
    warmup_lr: float = option(1e-5, "Learning rate the warm-up starts from.")
    min_lr: float = option(1e-6, "Learning rate the schedule ends at.")
    milestones: tuple[float, ...] = option((), "Epochs at which a multistep schedule drops.")
    gamma: tuple[float, ...] = option(
        (0.1,), "Factor of a multistep (one for all drops, or one each) or exponential (per epoch) schedule."
    )
    clip: float = option(0.0, "Largest gradient norm; 0 clips nothing.")
    ema: float = option(0.998, "Decay of the weight average; 0 keeps none.")
    freeze_norm: bool = option(False, "Keep BatchNorm statistics fixed while training.")
    keep: str = option("last", "Weights to return: last, or best on the validation images.", choices=("last", "best"))

    # images
    augment: str = option(
        "auto",
        "Changes to images: auto (crop and flip for those in memory, timm's recipe for files), none, flip, or a chain such as "
        "crop4+flip+rotate10.",
    )
    auto_augment: str = option("", "A policy of timm, e.g. rand-m9-mstd0.5-inc1.")
    mixup: float = option(0.0, "Mixup alpha.")
    cutmix: float = option(0.0, "Cutmix alpha.")
    random_erase: float = option(0.0, "Probability of random erasing.")
    small_images: float = option(
        0.0, "Share of the updates, the first ones, with images of 3/4 their side: faster, for any input size."
    )
    mean: tuple[float, ...] = option((), "Channel means, images in 0..1; default from the model.")
    std: tuple[float, ...] = option((), "Channel deviations, images in 0..1; default from the model.")
    workers: int = option(4, "Loader processes for images that are not kept in memory.")

    # machine
    device: str = option("auto", "Where it runs: auto, cpu, cuda, cuda:1, mps.")
    amp: str = option(
        "auto", "Autocast: auto (bf16 on a GPU that has it, else off), off, bf16, fp16.", choices=("auto", "off", "bf16", "fp16")
    )
    channels_last: bool = option(True, "Keep tensors in channels-last order.")
    find_unused: bool = option(False, "Several processes: look for parameters that a step leaves unused.")
    compile: bool = option(False, "Compile student and teacher by torch.compile.")
    cuda_graphs: bool = option(True, "On one CUDA GPU: record loss and gradients once and replay them as one launch.")

    # reliability and log
    checkpoint_steps: int = option(0, "Save the run each so many updates; 0 leaves it to the minutes.")
    checkpoint_minutes: float = option(5.0, "Save the run each so many minutes; 0 leaves it to the steps.")
    eval_epochs: int = option(1, "Validate each so many epochs (and at the end).")
    log_steps: int = option(50, "Updates between two lines of the log.")
    tensorboard: bool = option(False, "Also write tensorboard events.")

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value, choices = getattr(self, spec.name), spec.metadata["choices"]
            if isinstance(spec.default, tuple) and not isinstance(value, tuple):
                object.__setattr__(self, spec.name, tuple(value))
            elif type(spec.default) is float and type(value) is int:
                object.__setattr__(self, spec.name, float(value))
            elif not isinstance(value, type(spec.default)):
                raise SharefoldError(f"finetune: {spec.name}={value!r}: expected {type(spec.default).__name__}")
            if choices and value not in choices:
                raise SharefoldError(f"finetune: {spec.name}={value!r}: choose one of {', '.join(choices)}")
            if isinstance(spec.default, tuple) and not all(isinstance(entry, (int, float)) for entry in value):
                raise SharefoldError(f"finetune: {spec.name}={value!r}: expected numbers")
        for name in ("epochs", "batch_size", "accumulate", "eval_epochs", "log_steps"):
            if getattr(self, name) < 1:
                raise SharefoldError(f"finetune: {name}={getattr(self, name)}: must be at least 1")
        for name in ("distill", "label_smoothing", "ema", "random_erase", "small_images"):
            if not 0 <= getattr(self, name) <= 1:
                raise SharefoldError(f"finetune: {name}={getattr(self, name)}: must lie between 0 and 1")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < UNLIMITED:
                raise SharefoldError(f"finetune: {name}={getattr(self, name)}: must be positive and finite")
        for name in (
            "block_match", "orthogonality", "momentum", "eps", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "clip",
            "mixup", "cutmix", "workers", "checkpoint_steps", "checkpoint_minutes",
        ):  # fmt: skip
            if not 0 <= getattr(self, name) < UNLIMITED:
                raise SharefoldError(f"finetune: {name}={getattr(self, name)}: must not be negative, nor without limit")
        for name, low, words in (("gamma", 0.0, "factors"), ("milestones", 0.0, "epochs"), ("mean", -UNLIMITED, "numbers")):
            if not all(low <= value < UNLIMITED for value in getattr(self, name)):
                kind = "finite" if low else "finite and not negative"
                raise SharefoldError(f"finetune: {name}={getattr(self, name)}: {words} must be {kind}")
        if not all(0 < value < UNLIMITED for value in self.std):
            raise SharefoldError(f"finetune: std={self.std}: must be positive and finite")
        for name in ("block_names", "orthogonality_skip"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                raise SharefoldError(f"finetune: {name}={getattr(self, name)!r} is not a regular expression: {error}") from None
        if len(self.gamma) not in {1, len(self.milestones)}:
            raise SharefoldError(f"finetune: gamma: {len(self.gamma)} factors for {len(self.milestones)} milestones")
        if len(self.mean) != len(self.std):
            raise SharefoldError("finetune: mean and std: give both, with one value a channel")

    @classmethod
    def build(cls, base: FinetuneConfig | None = None, **overrides: Any) -> FinetuneConfig:
        """``base`` (default: the defaults) with ``overrides``; an unknown name raises with the nearest known one."""
        known = [spec.name for spec in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise SharefoldError(f"finetune: unknown setting {name!r}: {hint}")
        return dataclasses.replace(base or cls(), **overrides)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; ``FinetuneConfig.build(**d)`` restores it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
