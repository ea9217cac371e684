"""Refinement in bfloat16, where the processor computes in it and what it rounds is small beside what is to be learned.

Networks run under autocast, parameters and losses stay in float32, as in mixed-precision training (Micikevicius et al.,
https://arxiv.org/abs/1710.03740). Everything else that is measured of a network is measured in its own type.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.inputs import Input
from sharefold.layers import any_form_of
from sharefold.repair.refine_loss import Lessons
from sharefold.running import dtype_of

# What rounding may add to the loss, as a share of it. The errors of rounding are independent of those that are learned, so that
# they add up: it is noise of so much power.
NOISE = 0.05


def native(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 itself, and not by way of float32, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch as yet: where they are gone, nothing is lost but time.
    known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(is_supported is not None and is_supported() for is_supported in known)


def take_halves(taught: Lessons, batch: Input) -> bool:
    """Lets ``taught`` run its networks in bfloat16 if that is quicker and says the same of ``batch``.

    Both networks run twice, forward and backward; gradients are left as they were: none.
    """
    model = taught.model
    parameter = next(model.parameters())
    if taught.criterion is not None or dtype_of(model) != torch.float32 or not native(parameter.device):
        return False  # a user's criterion may not know the type
    exact = float(taught.loss(batch).detach())
    taught.dtype = torch.bfloat16
    try:
        loss = taught.loss(batch)
        loss.backward()
        close = abs(float(loss.detach()) - exact) <= NOISE * exact
    except (RuntimeError, TypeError):  # some operation of this network is not made for it
        close = False
    for tensor in model.parameters():
        tensor.grad = None
    if not close:
        taught.dtype = None
    return close


@contextmanager
def depthwise_in_full(model: nn.Module) -> Iterator[None]:
    """While active, depthwise layers of ``model`` on a CPU compute in float32 under autocast as well: their gradients in bfloat16
    take it up to six times as long. To be entered after anything else that replaces their ``forward``."""
    replaced = []
    for module in model.modules():
        form = any_form_of(module)
        if form is not None and 1 < form.groups == form.in_channels:
            replaced.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = _in_full(module.forward)
    try:
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _in_full(forward: Any) -> Any:
    def run(x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return forward(x)
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    return run
