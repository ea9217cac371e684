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

from sharefold.graph.attributes import Attributes
from sharefold.inputs import Input
from sharefold.layers import any_form_of
from sharefold.repair.refine_loss import Lessons, in_float32
from sharefold.running import dtype_of

# How much more or less the loss may be in bfloat16. Rounding is noise beside the errors that are to be learned: it adds its own
# power to theirs.
NOISE = 0.05


def native(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 itself, and not by way of float32, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch as yet: where they are gone, nothing is lost but time.
    known = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return device.type == "cpu" and any(is_supported is not None and is_supported() for is_supported in known)


def take_bfloat16(taught: Lessons, batch: Input) -> bool:
    """Lets ``taught`` run its networks in bfloat16 where the processor has it and they say the same of ``batch`` in it.

    Both networks run three times; gradients are None afterwards. Networks that keep something from one run to the
    next stay in float32: what they keep would be of the wrong type for others.
    """
    model, original = taught.model, taught.original
    device = next(model.parameters()).device
    if taught.criterion is not None or dtype_of(model) != torch.float32 or not native(device):
        return False  # a user's criterion may not know the type
    full = float(taught.loss(batch).detach())
    standing = Attributes(original, model)
    taught.dtype = torch.bfloat16
    try:
        loss = taught.loss(batch)
        loss.backward()
        close = abs(float(loss.detach()) - full) <= NOISE * full
        taught.loss(batch[: max(1, len(batch) - 1)])  # of a size that has not been seen: what is kept may depend on it
    except Exception:  # in float32 it has just run: something in it is not made for this type
        close = False
    if standing.put_back() or not close:
        taught.dtype = None
    for tensor in model.parameters():
        tensor.grad = None
    return taught.dtype is not None


@contextmanager
def depthwise_in_full(model: nn.Module) -> Iterator[None]:
    """While active, depthwise layers of ``model`` on a CPU compute in float32 under autocast as well: their gradients in bfloat16
    take it up to six times as long.

    To be entered after anything else that replaces their ``forward``. A teacher has no gradients and does not need it.
    """
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
    def run(*inputs: Any, **options: Any) -> Tensor:
        given = [*inputs, *options.values()]
        if not torch.is_autocast_enabled("cpu") or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in given):
            return forward(*inputs, **options)
        with torch.autocast("cpu", enabled=False):
            return forward(*map(in_float32, inputs), **{name: in_float32(value) for name, value in options.items()})

    return run
