"""Training under rounding: the forward pass sees rounded weights, the optimizer moves the weights behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharefold.store.specs_for import snap_
from sharefold.store.tensor_spec import StoreSpec


@contextmanager
def fake_quantize(model: nn.Module, spec: StoreSpec) -> Iterator[None]:
    """Inside, ``model`` always computes with tensors rounded as ``spec`` says; gradients go straight through.

    Any training loop runs under it unchanged: only while an optimizer steps do the parameters hold their unrounded
    values (Bengio et al., arXiv:1308.3432). State dicts taken inside are rounded, and so is the model afterwards.
    """
    hidden: dict[str, Tensor] = {}
    parameters = {name: p for name, p in model.named_parameters() if name in spec.tensors}
    owned = {id(p) for p in parameters.values()}

    def ours(optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) in owned for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if ours(optimizer):
            for name, parameter in parameters.items():
                parameter.copy_(hidden[name])

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if ours(optimizer):
            for name, parameter in parameters.items():
                hidden[name].copy_(parameter)
                parameter.copy_(spec.tensors[name].snapped(parameter))

    with torch.no_grad():
        for name, parameter in parameters.items():
            hidden[name] = parameter.detach().clone()
    snap_(model, spec)
    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        snap_(model, spec)
