"""Makes stand-in images look to a network like the images that it was trained on.

Every BatchNorm remembers the mean and variance of its inputs over the training data. Procedural images give others; a
few gradient steps on the pixels bring them close (Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via
DeepInversion", CVPR 2020, https://arxiv.org/abs/1912.08795, its feature term alone).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from sharefold.errors import SharefoldWarning
from sharefold.plans import Progress
from sharefold.running import device_of, evaluating
from sharefold.untrusted import first_line

# Adam's first step, in normalised pixel values; it falls linearly to 0.
RATE = 0.05
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def match_statistics(
    model: nn.Module, images: Tensor, steps: int = 10, *, batch_size: int = 100, seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """Images moved so that the batch statistics at every BatchNorm of ``model`` approach its running statistics.

    Args:
        model: a network in any mode; left as it was. Without trained BatchNorms the images come back unchanged.
        images: (n, C, H, W) normalised; unchanged, the result is a new tensor within their range of each channel.
        steps: Adam steps a batch.
        batch_size: images whose statistics are matched together.
        seed: of the division into batches.
        progress: called with ("matching procedural images", batches done, batches).
    """
    norms = trained_norms(model)
    if not norms or not steps:
        return images.clone()
    try:
        return _matched(model, norms, images, steps, batch_size, seed, progress)
    except (RuntimeError, IndexError, _Unmatched) as error:
        # Networks that compute without gradients, or change them on the way: as good as without norms.
        reason = first_line(error)
        warnings.warn(f"procedural images are not matched to the network's norms: {reason}", SharefoldWarning, stacklevel=3)
        return images.clone()


class _Unmatched(Exception):
    """There is nothing by which images could be moved."""


@torch.inference_mode(False)
def _matched(
    model: nn.Module, norms: list[nn.Module], images: Tensor, steps: int, batch_size: int, seed: int, progress: Progress | None
) -> Tensor:  # fmt: skip
    images = images.clone()  # outside of inference mode now
    low, high = (f(images, dim=(0, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
    result = images.clone()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = order.tensor_split(max(1, round(len(images) / batch_size)))
    device = device_of(model)
    with _watched(model, norms) as errors:
        for number, index in enumerate(batches):
            pixels = images[index].to(device).requires_grad_(True)
            optimizer = torch.optim.Adam([pixels], lr=RATE)
            for done in range(steps):
                optimizer.param_groups[0]["lr"] = RATE * (1 - done / steps)
                errors.clear()
                with torch.enable_grad():
                    model(pixels.clone())  # some networks write into what they are given
                    if not errors:
                        raise _Unmatched("none of them runs")
                    pixels.grad = torch.autograd.grad(torch.stack(errors).mean(), pixels)[0]
                optimizer.step()
                with torch.no_grad():
                    pixels.clamp_(low.to(device), high.to(device))
            if not bool(torch.isfinite(pixels).all()):
                raise _Unmatched("the steps are not finite")
            result[index] = pixels.detach().to(result)
            if progress is not None:
                progress("matching procedural images", number + 1, len(batches))
    return result


def trained_norms(model: nn.Module) -> list[nn.Module]:
    """BatchNorms that have seen data: one as it was initialised remembers nothing worth matching."""
    return [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None and _trained(m)]


def _trained(norm: nn.Module) -> bool:
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    return bool((mean != 0).any() or (variance != 1).any())


@contextmanager
def _watched(model: nn.Module, norms: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Eval mode, and a list that every forward pass fills with the error at each norm; undone at the end."""
    errors: list[Tensor] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        errors.append(_mismatch(norm, inputs[0] if inputs else next(iter(named.values()))))

    handles = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        with evaluating(model):
            yield errors
    finally:
        for handle in handles:
            handle.remove()


def _mismatch(norm: nn.Module, x: Tensor) -> Tensor:
    """Squared error of means over the running variance, plus that of the ratio of standard deviations."""
    channels = x.float().movedim(1, 0).flatten(1)
    eps = cast(float, norm.eps)
    mean, variance = cast(Tensor, norm.running_mean).float(), cast(Tensor, norm.running_var).float() + eps
    shift = (channels.mean(1) - mean).square() / variance
    ratio = (channels.var(1, unbiased=False) + eps).div(variance).sqrt()
    return (shift + (ratio - 1).square()).mean()
