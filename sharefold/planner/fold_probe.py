"""What leaving channels out of one hidden space alone does to the network's output, for each unit of its readers' error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sharefold.calibration.calibrate import Calibration
from sharefold.graph.hidden_channels import HiddenSpace
from sharefold.measure import device_of, evaluating, first_logits, run_on
from sharefold.methods import FOLD
from sharefold.methods.fold import Folding, options_for
from sharefold.plans import GroupPlan
from sharefold.solvers.channel_elimination import Elimination, column_index, left_out

# The relative error that readers are given, and on how many images; at most so many rows of logits a batch (per-pixel outputs).
ERROR, IMAGES, ROWS = 0.05, 128, 4096


class FoldProbe:
    """Runs the dense network with one space folded at a time: KL(original || folded) over the error, nats.

    On ResNet-20 this ratio hardly depends on how many channels go, and a diagonal Fisher misses it by a factor of ten for the
    last blocks, whose errors are alike at all positions.

    Args:
        cal: of a network that returns logits.
    """

    def __init__(self, cal: Calibration) -> None:
        self.cal = cal
        images = cal.deciding
        index = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).long()
        device = device_of(cal.original)
        self.batches = [batch.to(device) for batch in images[index].split(max(1, cal.statistics.batch_size))]
        self.reference = self._outputs()

    def _outputs(self) -> list[Tensor]:
        model = self.cal.original
        with torch.no_grad(), evaluating(model):
            rows = [first_logits(run_on(model, batch)).float().movedim(1, -1).flatten(0, -2) for batch in self.batches]
        return [found[:: max(1, len(found) // ROWS)].log_softmax(1) for found in rows]

    def __call__(self, space: HiddenSpace, found: Elimination, shares: Sequence[float]) -> float:
        """KL per unit of the readers' errors, each times its share."""
        errors = torch.tensor(list(shares), dtype=torch.float64) @ found.errors
        gone = int((errors - ERROR * sum(shares)).abs().argmin())
        if gone == 0 or float(errors[gone]) < 1e-9:
            return 1e-6
        kept = found.kept(space.channels - gone)
        plan = GroupPlan("probe", FOLD.name, (space.writer,), options_for(space, kept))
        with folded_readers(self.cal, plan):
            outputs = self._outputs()
        total = sum(float(F.kl_div(b, a, reduction="sum", log_target=True)) for a, b in zip(self.reference, outputs, strict=True))
        return max(total / sum(len(rows) for rows in self.reference) / float(errors[gone]), 1e-6)


@contextmanager
def folded_readers(cal: Calibration, plan: GroupPlan) -> Iterator[None]:
    """Inside, the readers of the calibrated network do without the channels that ``plan`` leaves out; all shapes stay."""
    solution = cast(Folding, FOLD.fit(cal.original, cal.graph, cal.statistics, plan))
    channels, kept = int(plan.options["channels"]), solution.kept
    saved: list[tuple[Tensor, Tensor]] = []

    def change(tensor: Tensor, new: Tensor) -> None:
        saved.append((tensor, tensor.detach().clone()))
        tensor.copy_(new)

    try:
        with torch.no_grad():
            for name, owner, tensors in zip(plan.options["readers"], solution.owners, solution.members, strict=True):
                layer = cal.original.get_submodule(name)
                weight = cast(Tensor, layer.weight)
                flat = weight.detach().flatten(1).double()
                block = flat.shape[1] // channels
                mine, gone = (column_index(c, block).to(flat.device) for c in (kept, left_out(kept, channels)))
                removed, new = flat[:, gone], flat.clone()
                new[:, mine] += removed @ tensors["mix"].to(flat)
                new[:, gone] = 0
                change(weight, new.reshape(weight.shape).to(weight))
                if owner:
                    shift = removed @ tensors["lost"].to(flat)
                    module = cal.original.get_submodule(owner)
                    place = cast(Tensor, layer.bias if owner == name else module.running_mean)
                    change(place, place + (shift if owner == name else -shift).to(place))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)

