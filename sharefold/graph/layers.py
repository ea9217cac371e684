"""Which modules are layers that can be shared, and what each of them is."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sharefold.layers import STOCK_LAYERS, ConvForm, SharedConv, checked_form, form_of

# By spatial axes: the classes of convolutions and the kinds of their forms, and what they take.
_AXES: dict[int, tuple[tuple[type[nn.Module], ...], tuple[str, ...]]] = {
    1: ((nn.Conv1d, nn.ConvTranspose1d), ("conv1d", "conv_transpose1d")),
    2: ((nn.Conv2d, nn.ConvTranspose2d), ("conv2d", "conv_transpose2d")),
    3: ((nn.Conv3d, nn.ConvTranspose3d), ("conv3d", "conv_transpose3d")),
}
_SHAPES = {1: "signals (n, C, L)", 2: "images (n, C, H, W)", 3: "volumes (n, C, D, H, W)"}
BATCH_NORM_KEYS = ("running_mean", "running_var")


def is_layer_like(module: nn.Module) -> bool:
    """True for every convolution and Linear, shareable or not."""
    return isinstance(module, STOCK_LAYERS)


def convolves(module: nn.Module, stock: type[nn.Module], kind: str) -> bool:
    """Whether ``module`` is a convolution of this kind, or a shared layer that stands in for one."""
    return isinstance(module, stock) or (isinstance(module, SharedConv) and module.form.kind == kind)


def spatial_axes(model: nn.Module) -> set[int]:
    """How many spatial axes (1 to 3) the convolutions among its layers have, whatever makes their weights."""
    return {axes for module in model.modules() for axes, (kinds, names) in _AXES.items() if any(
        convolves(module, kind, name) for kind, name in zip(kinds, names, strict=True)
    )}  # fmt: skip


def input_shapes(model: nn.Module) -> dict[int, str]:
    """What batches its convolutions may be given, by number of axes; images where it has none."""
    return {axes + 2: _SHAPES[axes] for axes in sorted(spatial_axes(model) or {2})}


def is_batch_norm(module: nn.Module, channels: int) -> bool:
    """True for a module with running statistics of ``channels`` entries (BatchNorm, frozen and fused variants)."""
    found = [getattr(module, key, None) for key in BATCH_NORM_KEYS]
    return all(isinstance(value, Tensor) and value.numel() == channels for value in found)


def find_layers(model: nn.Module) -> tuple[dict[str, ConvForm], dict[str, str]]:
    """Shareable layers by name, in registration order, and everything else that holds a weight, with the reason.

    Norms and per-channel scales hold no weight in this sense: their parameters are vectors.
    """
    layers: dict[str, ConvForm] = {}
    skipped: dict[str, str] = {}
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, STOCK_LAYERS):
            _skip_free_weights(name, module, skipped)
            continue
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
    if form_of(module) is None:
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
