"""Which modules are layers that can be shared, and what each of them is."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sharefold.layers import STOCK_LAYERS, ConvForm, SharedConv, checked_form, form_of

_SHAPES = {1: "signals (n, C, L)", 2: "images (n, C, H, W)", 3: "volumes (n, C, D, H, W)"}
# What computes a layer's output; put on one layer, it comes before that of the class.
_METHODS = frozenset(("forward", "_conv_forward", "_output_padding", "_call_impl"))
BATCH_NORM_KEYS = ("running_mean", "running_var")


def is_layer_like(module: nn.Module) -> bool:
    """True for every convolution and Linear, shareable or not."""
    return isinstance(module, STOCK_LAYERS)


def spatial_axes(module: nn.Module) -> int:
    """How many spatial axes (1 to 3) a convolution has, or the one that a shared layer stands in for; 0 of anything else."""
    layer: Any = module
    stock = isinstance(module, STOCK_LAYERS) and not isinstance(module, nn.Linear)
    return len(layer.kernel_size) if stock or (isinstance(module, SharedConv) and module.form.convolves) else 0


def input_shapes(model: nn.Module) -> dict[int, str]:
    """What batches its convolutions may be given, by number of axes, whatever makes their weights; images where it has none."""
    found = {spatial_axes(module) for module in model.modules()} - {0}
    return {axes + 2: _SHAPES[axes] for axes in sorted(found or {2})}


def is_batch_norm(module: nn.Module, channels: int) -> bool:
    """True for a module with running statistics of ``channels`` entries (BatchNorm, frozen and fused variants)."""
    found = [getattr(module, key, None) for key in BATCH_NORM_KEYS]
    return all(isinstance(value, Tensor) and value.numel() == channels for value in found)


def find_layers(model: nn.Module) -> tuple[dict[str, ConvForm], dict[str, str]]:
    """Shareable layers by name, in registration order, and everything else that holds a weight, with the reason.

    Norms and per-channel scales hold no weight in this sense: their parameters are vectors. Nor do the modules that make the
    weight of a parametrized layer, which is listed itself.
    """
    layers: dict[str, ConvForm] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, str] = {}
    listed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if not isinstance(module, STOCK_LAYERS):
            if module not in listed:
                _skip_free_weights(name, module, skipped)
            continue
        if parametrize.is_parametrized(module, "weight"):
            listed.update(cast(nn.ModuleDict, module.parametrizations)["weight"].modules())
        reason = _obstacle(module)
        weight = module._parameters.get("weight")
        if reason is None and weight is not None and id(weight) in owners:
            other = owners[id(weight)]
            reason = f"its weight is already shared with {other}"
            layers.pop(other, None)
            skipped.setdefault(other, f"its weight is already shared with {name}")
        if weight is not None:
            owners.setdefault(id(weight), name)
        if reason is None:
            layers[name] = checked_form(name, module)
        else:
            skipped[name] = reason
    return layers, skipped


def _obstacle(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized: remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not an ordinary parameter (weight norm, quantisation or a computed weight)"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}: only real floating-point weights are shared"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has a forward hook, which a shared layer would not call: remove the hook first"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has a backward hook, which a shared layer would not call: remove the hook first"
    if not _METHODS.isdisjoint(vars(module)) or form_of(module) is None:
        return f"{type(module).__name__} has a forward of its own, which a shared layer could not stand in for"
    return None


def _skip_free_weights(name: str, module: nn.Module, skipped: dict[str, str]) -> None:
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.numel() == max(parameter.shape, default=1):
            continue
        if key == "weight" and name:
            skipped[name] = f"{type(module).__name__}: its weight is not that of a plain convolution or Linear"
        else:
            skipped[f"{name}.{key}" if name else key] = f"a parameter of {type(module).__name__}, not a layer"
