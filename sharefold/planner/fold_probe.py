"""What leaving channels out of one hidden space alone does to the network's output, for each unit of its readers' error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.calibration.calibrate import Calibration, copied
from sharefold.graph.hidden_channels import HiddenSpace
from sharefold.layers import shift_output
from sharefold.methods import FOLD
from sharefold.methods.fold import Folding, made_up, options_for
from sharefold.plans import GroupPlan
from sharefold.running import evenly
from sharefold.solvers.channel_elimination import Elimination

# The relative error that readers are given, and on how many images.
ERROR, IMAGES = 0.05, 128


class FoldProbe:
    """Runs the dense network with one space folded at a time: its divergence from the original over the error.

    On ResNet-20 this ratio hardly depends on how many channels go, and a diagonal Fisher misses it by a factor of ten for the
    last blocks, whose errors are alike at all positions.

    Args:
        cal: of a network that returns logits.
    """

    def __init__(self, cal: Calibration) -> None:
        self.cal, self.network = cal, copied(cal.original)
        images = cal.decide_views
        self.comparison = cal.comparison(images[evenly(len(images), IMAGES)])

    def __call__(self, space: HiddenSpace, found: Elimination, shares: Sequence[float]) -> float:
        """KL per unit of the readers' errors, each times its share."""
        errors = torch.tensor(list(shares), dtype=torch.float64) @ found.errors
        gone = int((errors - ERROR * sum(shares)).abs().argmin())
        if gone == 0 or float(errors[gone]) < 1e-9:
            return 1e-6
        kept = found.kept(space.channels - gone)
        plan = GroupPlan("probe", FOLD.name, (space.writer,), options_for(space, kept))
        with folded_readers(self.network, self.cal, plan):
            lost = self.comparison.divergence(self.network).mean
        return max(lost / float(errors[gone]), 1e-6)


@contextmanager
def folded_readers(network: nn.Module, cal: Calibration, plan: GroupPlan) -> Iterator[None]:
    """Inside, the readers of ``network``, a copy of the calibrated one, do without the channels that ``plan`` leaves out; all
    shapes stay."""
    solution = cast(Folding, FOLD.fit(cal.original, cal.graph, cal.statistics, plan))
    channels, kept = int(plan.options["channels"]), solution.kept
    saved: list[tuple[Tensor, Tensor]] = []

    def change(tensor: Tensor, new: Tensor) -> None:
        saved.append((tensor, tensor.detach().clone()))
        tensor.copy_(new)

    try:
        with torch.no_grad():
            for name, owner, tensors in zip(plan.options["readers"], solution.owners, solution.members, strict=True):
                layer = network.get_submodule(name)
                weight = cast(Tensor, layer.weight)
                stays, shift, mine = made_up(weight, tensors, kept, channels)
                new = stays.new_zeros(len(weight), weight[0].numel())
                new[:, mine] = stays
                change(weight, new.reshape(weight.shape).to(weight))
                if shift is not None:
                    module = network.get_submodule(owner)
                    place = cast(Tensor, layer.bias if owner == name else module.running_mean)
                    saved.append((place, place.detach().clone()))
                    shift_output(module, shift)
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)

