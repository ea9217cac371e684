"""Optimizer and learning rate: parameter groups by role, then timm's optimizers and schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sharefold.errors import SharefoldError
from sharefold.finetune.config import FinetuneConfig
from sharefold.layers import shared_layers
from sharefold.layers.bank import ATTRIBUTE, banks

ADAPTIVE = ("adam", "lamb", "lion", "adan", "adopt", "mars", "muon", "nadam", "radam", "rmsprop", "lars", "adafactor",
            "adabelief", "laprop", "soap", "kron", "novograd", "madgrad")  # fmt: skip


@dataclass(frozen=True)
class Role:
    """What a parameter is to the optimizer: the number of layers that use it, and whether it decays."""

    uses: int
    decays: bool


def roles(model: nn.Module, decay: str = "filters") -> dict[str, Role]:
    """Name -> role of every trainable parameter.

    With ``decay="filters"`` weights, bases and own filters decay; coefficients, scales, norms and biases do not: a
    coefficient row is the layer's filter seen from the basis, and pulling it to zero undoes the fit of the conversion.
    """
    uses = {f"{ATTRIBUTE}.{key}.": bank.uses for key, bank in banks(model).items()}
    no_filters = {
        f"{name}.{key}" if name else key
        for name, layer in shared_layers(model).items()
        for key, _ in layer.named_parameters(recurse=False)
        if key != layer.pivoted_name
    }
    result = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        count = next((n for prefix, n in uses.items() if name.startswith(prefix)), 1)
        filters = parameter.ndim > 1 and name not in no_filters
        result[name] = Role(max(1, count), decay == "all" or filters)
    return result


def bank_scale(config: FinetuneConfig, uses: int) -> float:
    """Factor on the step of a tensor that ``uses`` layers share.

    Its gradient is the sum over the layers. Plain SGD would step K times too far, an adaptive optimizer divides the
    gradient's size out by itself.
    """
    if config.bank_step == "1/K":
        return 1 / uses
    if config.bank_step == "auto":
        return 1.0 if config.optimizer.lower().startswith(ADAPTIVE) else 1 / uses
    try:
        factor = float(config.bank_step)
    except ValueError:
        factor = math.nan
    if not 0 <= factor < math.inf:
        raise SharefoldError(f"finetune: bank_step={config.bank_step!r}: use auto, 1/K or a number from 0") from None
    return factor if uses > 1 else 1.0


def parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """Optimizer groups {params, names, weight_decay, lr_scale}, one for each combination, in a fixed order."""
    parameters = dict(model.named_parameters())
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, role in roles(model, config.decay).items():
        scale = bank_scale(config, role.uses)
        group = groups.setdefault((scale, role.decays), {
            "params": [], "names": [], "lr_scale": scale, "weight_decay": config.weight_decay if role.decays else 0.0,
        })  # fmt: skip
        group["params"].append(parameters[name])
        group["names"].append(name)
    if not groups:
        raise SharefoldError("finetune: the model has no trainable parameter: set requires_grad on some")
    return list(groups.values())


def build_optimizer(model: nn.Module, config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of timm.optim that the configuration names."""
    return optimizer_of([{k: v for k, v in group.items() if k != "names"} for group in parameter_groups(model, config)], config)


def optimizer_of(groups: list[dict[str, Any]], config: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names, of {params, weight_decay, lr_scale}."""
    from timm.optim import create_optimizer_v2

    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    if config.eps:
        options["eps"] = config.eps
    try:
        optimizer = create_optimizer_v2(groups, opt=config.optimizer, **options)
    except (ValueError, AssertionError, TypeError) as error:
        raise SharefoldError(
            f"finetune: optimizer={config.optimizer!r}: {error}: use one of timm.optim, e.g. adamw, sgd, lamb"
        ) from None
    on_gpu = all(p.device.type == "cuda" for group in groups for p in group["params"])
    if on_gpu and type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
        for group in optimizer.param_groups:  # a few kernels for all tensors, which are many and small
            group["fused"], group["foreach"] = True, False
    return optimizer


class Schedule:
    """The learning rate as a function of the number of updates made; nothing to save but that number."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps_per_epoch: int) -> None:
        from timm.scheduler.cosine_lr import CosineLRScheduler

        total = config.epochs * steps_per_epoch
        warmup = min(round(config.warmup_epochs * steps_per_epoch), total - 1)
        common: dict[str, Any] = {"warmup_t": warmup, "warmup_lr_init": min(config.warmup_lr, config.lr)}
        self._follow: Callable[[int], None]
        if config.schedule == "cosine":
            self._follow = CosineLRScheduler(
                optimizer, t_initial=total - warmup, lr_min=min(config.min_lr, config.lr), t_in_epochs=False,
                warmup_prefix=True, **common,
            ).step_update  # fmt: skip
        else:
            self._follow = _Shaped(optimizer, config, steps_per_epoch, warmup, SHAPES[config.schedule])
        self._follow(0)

    def step(self, updates: int) -> None:
        """Sets the rate for the update after ``updates`` updates."""
        self._follow(updates)


class _Shaped:
    """A rate of lr x shape(epoch), after linear warm-up."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: FinetuneConfig, steps_per_epoch: int, warmup: int,
                 shape: Callable[[float, FinetuneConfig], float]) -> None:  # fmt: skip
        self.optimizer, self.config, self.steps = optimizer, config, steps_per_epoch
        self.warmup, self.shape = warmup, shape

    def __call__(self, updates: int) -> None:
        config = self.config
        rate = config.lr * self.shape(updates / self.steps, config)
        if updates < self.warmup:
            rate = config.warmup_lr + (config.lr - config.warmup_lr) * updates / self.warmup
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]


def _constant(epoch: float, config: FinetuneConfig) -> float:
    return 1.0


def _multistep(epoch: float, config: FinetuneConfig) -> float:
    factors = config.gamma * len(config.milestones) if len(config.gamma) == 1 else config.gamma
    return math.prod(f for m, f in zip(config.milestones, factors, strict=True) if epoch >= m)


def _exponential(epoch: float, config: FinetuneConfig) -> float:
    return config.gamma[0] ** int(epoch)


def _cyclical(epoch: float, config: FinetuneConfig) -> float:
    """kEffNet's 25-epoch cycle, https://doi.org/10.3233/FAIA210112, as a multiple of its base rate 0.001."""
    place = int(epoch) % 25
    return 1 + 0.5 * place if place < 7 else 4 * 0.85 ** (place - 7)


SHAPES: dict[str, Callable[[float, FinetuneConfig], float]] = {
    "constant": _constant, "multistep": _multistep, "exponential": _exponential, "cyclical": _cyclical,
}  # fmt: skip
