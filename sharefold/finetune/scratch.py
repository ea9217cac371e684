"""Random weights for a network that is to be trained from scratch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sharefold.format import carried_config
from sharefold.layers import SharedConv, bank_key, banks


@torch.no_grad()
def reinitialize(model: nn.Module, seed: int = 0, joint: bool = False) -> None:
    """Draws all weights anew, in place: kernels by He et al. (normal, fan-out, https://arxiv.org/abs/1502.01852), norms
    1 and 0, shared bases with orthonormal rows as far as there are dimensions for them.

    joint: the bases of one stage with rows of one length are orthonormal together (two bases a stage, as published for
    Deeply Shared Filter Bases).
    """
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) or hasattr(module, "running_mean"):
            module.reset_parameters()  # type: ignore[operator]
        if isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, SharedConv):
            for name, value in module.named_parameters(recurse=False):
                _draw(name, value)
    bases: dict[object, list[Tensor]] = {}
    config = carried_config(model)
    plans = {bank_key(group.name): group for group in (config.plan.groups if config else [])}
    for key, bank in banks(model).items():
        for name, value in bank.named_parameters():
            if name != "basis" or bank.pivots is not None:
                _draw(name, value)
                continue
            together = (plans[key].stage, value[0].numel()) if joint and key in plans else key
            bases.setdefault(together, []).append(value)
    for members in bases.values():
        rows = torch.empty(sum(len(m) for m in members), members[0][0].numel())
        nn.init.orthogonal_(rows)
        for member, part in zip(members, rows.split([len(m) for m in members]), strict=True):
            member.copy_(part.view_as(member))


def _draw(name: str, value: Tensor) -> None:
    if value.ndim > 1:
        nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu")
    else:  # scales and gains begin at 1, biases at 0
        value.fill_(0.0 if "bias" in name else 1.0)
