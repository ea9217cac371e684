"""What refinement learns from: the original's block outputs and answers, each compared over its variance.

Blocks that both networks have with outputs of one shape are hints (Romero et al., https://arxiv.org/abs/1412.6550). There is no
divergence of the predictions: a network is nearly certain of the images that it was trained on, and a student that learns to be
as certain of those follows it less well on new ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration
from sharefold.errors import SharefoldError
from sharefold.inputs import Input, Inputs
from sharefold.running import run_on

# A block's name, and which of its runs in one run of the network.
BlockRun: TypeAlias = tuple[str, int]


@dataclass(frozen=True)
class Blocks:
    """Blocks that are compared, while both networks are watched.

    Attributes:
        names, spreads: of those whose outputs have one shape, and the variances of the teacher's.
        theirs, ours: the outputs of the networks' last runs.
    """

    names: list[BlockRun]
    spreads: list[float]
    theirs: dict[BlockRun, Tensor]
    ours: dict[BlockRun, Tensor]

    def losses(self) -> list[Tensor]:
        """One a block, of the last batch that both networks ran on."""
        ours, theirs = ([seen[name] for name in self.names] for seen in (self.ours, self.theirs))
        return relative_errors(ours, theirs, self.spreads)


@contextmanager
def lessons(
    cal: Calibration, model: nn.Module, first: Input, names: Sequence[str], scaled: Collection[str]
) -> Iterator[Lessons]:
    """The lessons of ``model``; both networks' blocks are watched while this is active.

    Args:
        first: images by which blocks and outputs are compared at first.
        names: of blocks; those without one tensor of one shape in both networks are left out.
        scaled: sources of logits that get their best scale afterwards.
    """
    runs, spreads = _comparable(cal.original, model, first, names)
    hooked, every = {name for name, _ in runs}, isinstance(first, Inputs)
    with block_outputs(cal.original, hooked, every) as theirs, block_outputs(model, hooked, every) as ours:
        yield Lessons(cal, model, first, scaled, Blocks(runs, spreads, theirs, ours))


class Lessons:
    """The student's blocks and outputs against the teacher's; outputs by the loss of the divergence, or the user's criterion.

    Attributes:
        dtype: what the networks run in under autocast; None for their own.
    """

    def __init__(self, cal: Calibration, model: nn.Module, first: Input, scaled: Collection[str], blocks: Blocks) -> None:
        self.original, self.model, self.divergence, self.criterion = cal.original, model, cal.divergence, cal.criterion
        self.scaled, self.blocks = scaled, blocks
        self.dtype: torch.dtype | None = None
        with torch.no_grad():
            self.spreads = self.divergence.spreads(self.divergence.reading.run(self.original, first))
        self._unit = 0.0

    def loss(self, batch: Input, faded: float = 0.0) -> Tensor:
        """The mean over outputs and blocks; both networks run.

        Blocks say more of where a network goes wrong, but a small one cannot follow in all of them to the end.

        Args:
            faded: by which share less than outputs blocks count.

        Raises:
            SharefoldError: nothing of what the network says can be learned.
        """
        outputs, blocks = self._of_outputs(batch), [(1 - faded) * loss for loss in self.blocks.losses()]
        return torch.stack(outputs + blocks).mean()

    def relative_error(self, batch: Input) -> float | None:
        """Squared error over variance, the mean over outputs and blocks; None where there is a user's criterion and no block."""
        wanted, found, _ = self._run(batch)
        outputs = [] if self.criterion is not None else self._losses(wanted, found)
        known = self.blocks.losses() + outputs
        return float(torch.stack(known).mean().detach()) if known else None

    def _of_outputs(self, batch: Input) -> list[Tensor]:
        wanted, found, raws = self._run(batch)
        if self.criterion is not None:
            value = self.criterion(*raws).float().mean()
            if value.requires_grad:
                self._unit = self._unit or max(float(value.detach().abs()), 1e-12)
                return [value / self._unit]
        return self._losses(wanted, found)

    def _run(self, batch: Input) -> tuple[list[Tensor], list[Tensor], tuple[Any, Any]]:
        """What the teacher and the student say of ``batch``: the leaves that are compared of each, and all that both return."""
        reading, kind = self.divergence.reading, next(self.model.parameters()).device.type
        with nullcontext() if self.dtype is None else torch.autocast(kind, self.dtype):
            with torch.no_grad():
                raw, wanted = reading.run_raw(self.original, batch)
            raw_found, found = reading.run_raw(self.model, batch)
        if self.dtype is not None:
            wanted, found = ([in_float32(leaf) for leaf in leaves] for leaves in (wanted, found))
        return wanted, found, (raw, raw_found)

    def _losses(self, wanted: list[Tensor], found: list[Tensor]) -> list[Tensor]:
        losses = self.divergence.losses(found, wanted, self.spreads, self.scaled)
        if not losses:
            raise SharefoldError("refine: no output of this network has a gradient to learn from: convert without it")
        return losses


def in_float32(value: Any) -> Any:
    """A tensor of bfloat16 as float32, in which losses are summed; everything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def relative_errors(student: Sequence[Tensor], teacher: Sequence[Tensor], spreads: Sequence[float]) -> list[Tensor]:
    """The mean squared differences of equally shaped outputs over the teacher's variance."""
    pairs = zip(student, teacher, spreads, strict=True)
    return [F.mse_loss(s.float(), t.float()) / spread for s, t, spread in pairs]


@torch.no_grad()
def _comparable(
    original: nn.Module, model: nn.Module, batch: Input, blocks: Sequence[str]
) -> tuple[list[BlockRun], list[float]]:
    """Those runs of blocks whose outputs are single tensors of one shape in both networks, and the original's variances."""
    modules = dict(model.named_modules())
    names = [name for name in blocks if name in modules]
    every = isinstance(batch, Inputs)
    with block_outputs(original, names, every) as theirs, block_outputs(model, names, every) as ours:
        run_on(original, batch)
        run_on(model, batch)
        runs = sorted(theirs, key=lambda run: (names.index(run[0]), run[1]))
        both = [run for run in runs if run in ours and theirs[run].shape == ours[run].shape]
        spreads = [_spread(theirs[run]) for run in both]
    usable = [(run, spread) for run, spread in zip(both, spreads, strict=True) if spread > 0]
    return [run for run, _ in usable], [spread for _, spread in usable]


def _spread(output: Tensor) -> float:
    """Variance within channels of maps (B, C, H, W) or tokens (B, n, C), mean over channels."""
    channels = output.float().movedim(2 if output.ndim == 3 else 1, 0).flatten(1)
    return float(channels.var(1, unbiased=False).mean())


@contextmanager
def block_outputs(model: nn.Module, names: Iterable[str], every: bool = False) -> Iterator[dict[BlockRun, Tensor]]:
    """The output tensors of each named module in the network's last run; blocks that run more than once count by their last
    run, with ``every`` by all, as several inputs may pass one block."""
    seen: dict[BlockRun, Tensor] = {}
    handles = [model.register_forward_pre_hook(lambda *_: seen.clear())] if every else []
    for name in names:

        def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                before = sum(other == name for other, _ in seen) if every else 0
                seen[name, before] = output

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
