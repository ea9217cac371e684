"""BatchNorms with fixed statistics run inside of the convolution in front of them, and stay trainable.

A norm in eval mode is one multiplication and one addition a channel, yet it costs a pass over the whole map forward and
two backward. With its scale in the filters (Jacob et al., https://arxiv.org/abs/1712.05877, section 3.2) that pass is
gone, and gradients still reach the norm's weight and bias through the filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from sharefold.layers.batchnorm import affine
from sharefold.layers.form import ConvForm
from sharefold.layers.shared_conv import SharedConv, any_form_of
from sharefold.layers.weight_order import rounded_once
from sharefold.running import dtype_of, evaluating

# Images on which a network with fused norms is held against itself, and what they may differ by.
FEW, SAME = 2, 1e-3


@contextmanager
def norms_fused(
    model: nn.Module, norms: Mapping[str, str | None], *, constant: bool = False, dtype: torch.dtype | None = None
) -> Iterator[list[str]]:
    """While active, ``model`` runs the named layers and the norms behind them as one convolution each.

    Args:
        model: in eval mode; its modules run as before afterwards.
        norms: for every layer the norm that alone reads its output, or None (as in ``NetworkGraph.layers``). Pairs
            that cannot be fused (Linears, users' subclasses of Conv2d, standardised weights, other norms) run as they are.
        constant: nothing in it changes while this is active: what the filters become is computed once, and gets no gradient.
        dtype: of the constant filters (default: their own).

    Yields:
        The layers that were fused.
    """
    modules = dict(model.named_modules())
    fused: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, norm_name in norms.items():
        layer, norm = modules.get(name), modules.get(norm_name or "")
        if layer is not None and norm is not None and fusable(layer, norm):
            fused[name] = layer, norm
    try:
        for layer, norm in fused.values():
            form = cast(ConvForm, any_form_of(layer))
            layer.__dict__["forward"] = _constant(layer, norm, form, dtype) if constant else partial(_both, layer, norm, form)
            norm.__dict__["forward"] = _rest(norm)
        yield list(fused)
    finally:
        for pair in fused.values():
            for module in pair:
                module.__dict__.pop("forward", None)


@contextmanager
def fused_for_inference(*models: nn.Module, norms: Mapping[str, str | None]) -> Iterator[None]:
    """Networks that do not change meanwhile run with their norms fused, where they compute in full precision.

    A norm in eval mode takes a CPU about as long as the convolution in front of it. Answers differ by rounding.

    Args:
        models: in eval mode, of the same names of layers.
        norms: as for :func:`norms_fused`.
    """
    with ExitStack() as stack:
        for model in models:
            if dtype_of(model) in (torch.float32, torch.float64):
                stack.enter_context(norms_fused(model, norms, constant=True))
        yield


def norms_that_fuse(
    model: nn.Module, norms: Mapping[str, str | None], answers: Callable[[nn.Module], Sequence[Tensor]]
) -> Mapping[str, str | None]:
    """``norms``, or none at all where ``model`` does not answer the same with them fused: without a graph, other readers of a
    layer's output are not seen.

    Args:
        model: in any mode, which it keeps; asked in eval mode.
        norms: as for :func:`norms_fused`.
        answers: what ``model`` says on a few images, and whatever else of it must stay the same.
    """
    if not any(norms.values()):
        return {}
    with evaluating(model):
        plain = answers(model)
        try:
            with fused_for_inference(model, norms=norms):
                fused = answers(model)
        except RuntimeError:  # modules of several types, say
            return {}
    return norms if len(plain) == len(fused) and all(map(_alike, plain, fused)) else {}


def _alike(plain: Tensor, fused: Tensor) -> bool:
    """Whether outputs differ by no more than rounding."""
    if not plain.is_floating_point() or plain.shape != fused.shape:
        return torch.equal(plain, fused)
    size = float(plain.abs().amax()) if plain.numel() else 0.0
    return torch.allclose(fused, plain, rtol=SAME, atol=SAME * size, equal_nan=True)


def fusable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm's scale is known to multiply the layer's filters, and nothing else happens between the two."""
    if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or norm.training or norm.running_mean is None:
        return False
    if "forward" in layer.__dict__ or "forward" in norm.__dict__:
        return False  # somebody else's patch, or a layer that two names share
    if {p.dtype for module in (layer, norm) for p in module.parameters()} != {norm.running_mean.dtype}:
        return False  # of several types: what comes out would be of another than the next layer expects
    if isinstance(layer, SharedConv):
        return layer.form.kind == "conv2d" and layer.form.standardize is None
    return type(layer) in (nn.Conv2d, Conv2dSame)


def _both(layer: Any, norm: Any, form: ConvForm, x: Tensor) -> Tensor:
    """The layer and its norm on (B, I, H, W)."""
    weight, shift = rounded_once(x, partial(_merged, layer, norm))
    return form.apply(x, weight, shift)


def _merged(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight (O, I/groups, h, w) and bias (O,) of both."""
    scale, shift = affine(norm)
    if layer.bias is not None:
        shift = shift + layer.bias * scale
    if not isinstance(layer, SharedConv):
        weight = layer.weight
    elif layer.given is not None and layer.given.dtype == scale.dtype:
        weight = layer.given
    else:
        weight = layer.compose()
    return weight * scale[:, None, None, None], shift


@torch.no_grad()
def _constant(layer: Any, norm: Any, form: ConvForm, dtype: torch.dtype | None) -> Any:
    weight, shift = _merged(layer, norm)
    weight, shift = weight.to(dtype or weight.dtype), shift.to(dtype or shift.dtype)
    return lambda x: form.apply(x, weight, shift)


def _rest(norm: Any) -> Any:
    """What is left of a norm without its scale and shift."""
    if isinstance(norm, BatchNormAct2d):
        return lambda x: norm.act(norm.drop(x))
    return lambda x: x
