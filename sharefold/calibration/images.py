"""Calibration images: the user's, checked, or procedural ones when there are none."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sharefold.calibration.input_matching import match_statistics
from sharefold.calibration.several_inputs import checked_inputs, first_of, ordinary, procedural_inputs
from sharefold.data import calibration_images
from sharefold.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.graph.layers import input_shapes, spatial_axes
from sharefold.graph.preserved import tried
from sharefold.inputs import AnyInput, Input, Inputs, check_count, each_of, image_shape, parameters_of
from sharefold.outputs.leaves import tensors_of
from sharefold.plans import Progress
from sharefold.running import batch_within, dtype_of

# Enough for every moment of a CIFAR network, and to report agreement within a few points; of large procedural images, fewer.
COUNT, LARGE_COUNT = 1000, 64
SMALL_PIXELS = 64 * 64
# The largest images that are matched; how many together, and pixels of them, whose maps and gradients lie in memory at once.
MATCHED_PIXELS = 384 * 384
MATCHED_TOGETHER, BATCH_PIXELS = 100, 32 * 224 * 224


def input_config(model: nn.Module, seen: Input | None = None) -> dict[str, Any]:
    """Input size, mean and std that ``model`` carries (timm's ``pretrained_cfg``); else the size of the images that it was
    ``seen`` to take, and ImageNet's of what is not known (of other than three channels the average for each)."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    config = dict(config) if isinstance(config, dict) else dict(vars(config))
    own = seen.shape[1:] if isinstance(seen, Tensor) and seen.ndim == 4 else (3, 224, 224)
    size = tuple(config.get("input_size") or own)
    usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    if size[0] != 3:
        usual = {name: (sum(values) / 3,) * size[0] for name, values in usual.items()}
    return {"input_size": size, **{name: tuple(config.get(name) or values) for name, values in usual.items()}}


def procedural_images(model: nn.Module, count: int | None = None, seed: int = 0) -> Tensor:
    """Dead-leaves images (n, C, H, W), normalised as ``model`` expects and matched to its BatchNorm statistics.

    Images beyond 384 x 384 are not matched: their many steps would cost far more than the conversion itself.
    """
    config = input_config(model)
    if count is None:
        count = default_count(*config["input_size"][1:])
    made = calibration_images(None, config, count, seed)
    return matched(model, made.to(dtype_of(model)), seed)


def count_distinct(images: Input) -> int:
    """How many of the samples are different from all others, to the bit."""
    bits = [tensor.detach().cpu().contiguous().flatten(1).view(torch.uint8) for tensor in each_of(images)]
    return len({tuple(hash(part[index].numpy().tobytes()) for part in bits) for index in range(len(images))})


def warn_about(images: Input, reported: bool) -> None:
    """Warns of calibration samples that can hardly be meant; called by :func:`sharefold.calibrate` alone, whose caller it names.

    Args:
        reported: whether figures are taken on some of them.

    Warns:
        SharefoldWarning: most images are of one colour, or some of those that figures are taken on are copies.
    """
    plain = 0
    if isinstance(images, Tensor) and images.dim() == 4 and images[0, 0].numel() > 1:
        plain = int((images.amax((2, 3)) == images.amin((2, 3))).all(1).sum())
    if 2 * plain > len(images):
        text = f"{plain} of {len(images)} calibration images are of one colour each, and tell little: check how they were made"
    elif reported and (copies := len(images) - count_distinct(images)):
        text = (
            f"{copies} of {len(images)} calibration images are copies of others: what is reported on them counts them as if they "
            "were new"
        )
    else:
        return
    warnings.warn(text, SharefoldWarning, stacklevel=5)


def default_count(height: int, width: int, procedural: bool = True) -> int:
    """Calibration images to take at this size; procedural ones have to be made and matched, a step of the network at a time."""
    return LARGE_COUNT if procedural and height * width > SMALL_PIXELS else COUNT


def matched(model: nn.Module, images: Tensor, seed: int = 0, progress: Progress | None = None) -> Tensor:
    """Procedural images (n, C, H, W) after :func:`match_statistics`, when they are small enough for it.

    Unmatched ones hardly tell classes apart: EfficientNet-Lite0 at 80 % of its parameters, planned on 1,000 of them, kept 61.2 %
    top-1 of 82.7; planned on 64 matched ones 79.5 % (docs/log.md).
    """
    pixels = images.shape[-2] * images.shape[-1]
    if pixels > MATCHED_PIXELS:
        return images
    batch = batch_within(BATCH_PIXELS, pixels, MATCHED_TOGETHER)
    return match_statistics(model, images, batch_size=batch, seed=seed, progress=progress)


def calibration_or_procedural(
    model: nn.Module, given: AnyInput | None, seed: int = 0, example: Input | None = None
) -> Input:
    """What a user gives to calibrate with after a check, or procedural images.

    Args:
        given: images (n, C, H, W), or what else the network takes, vectors (n, F) among them; a tuple of tensors (n, ...) for a
            network of several inputs; or a loader, or whatever else gives batches, of which the first ``COUNT`` samples are
            taken.
        example: of what a network of several inputs takes, after which procedural ones are made.

    Raises:
        SharefoldError: not a float tensor of a shape that the network takes, no image, NaN, or not the channel count that it
            takes; several tensors that do not belong together, or not as many as ``forward`` takes; none for a network of several
            inputs.
    """
    images = given if given is None or isinstance(given, Tensor | Inputs) else first_of(model, given, COUNT)
    if isinstance(images, Inputs):
        return checked_inputs(model, images, dtype_of(model))
    if images is None:
        if isinstance(example, Inputs):
            _, *size = image_shape(example)
            made = procedural_inputs(model, example, default_count(size[0], size[1]) if len(size) == 2 else COUNT, seed)
            return checked_inputs(model, made, dtype_of(model))
        names, needed, _ = parameters_of(model)
        if needed > 1:
            raise SharefoldError(
                f"calibration: {type(model).__name__} takes several inputs ({', '.join(names[:needed])}), of sizes that it does "
                "not say: pass a tuple of tensors (n, ...), or calibrate with example_input=(...)"
            )
        shapes = input_shapes(model)
        if 4 not in shapes:
            wanted = " or ".join(shapes.values())
            raise SharefoldError(f"calibration: the network takes {wanted}, and none can be made up: pass some")
        return procedural_images(model, seed=seed)
    # Other axes may be merged into the batch on the way, as frames of a video are.
    shapes = input_shapes(model) | {4: "images (n, C, H, W)"}
    if not isinstance(images, Tensor) or not images.is_floating_point():
        what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        if isinstance(images, Mapping):
            raise SharefoldError(f"calibration: {what}: pass several inputs as a tuple of tensors, in the order of forward")
        raise SharefoldError(f"calibration: {what} is no float tensor of {' or '.join(shapes.values())}: pass normalised ones")
    if len(images) == 0:
        raise SharefoldError("calibration: there are no images: pass at least one")
    if images.dim() not in shapes:
        _check_takes(model, images, " or ".join(shapes.values()))
    if not bool(torch.isfinite(images).all()):
        raise SharefoldError("calibration: the images hold NaN or infinity: check how they were normalised")
    # Which layer comes first is not known yet; an image that no layer could take is wrong, unless the network rearranges its
    # channels first. Signals may lie (n, L, C), to be turned by the network: what it cannot take is seen when it runs.
    widths = [cast(int, m.in_channels) for m in model.modules() if spatial_axes(m) == 2]
    if images.dim() == 4 and widths and images.shape[1] not in widths and tried(model, images[:1].to(dtype_of(model)))[1]:
        raise SharefoldError(
            f"calibration: images have {images.shape[1]} channels, the model takes {widths[0]}: convert the images"
        )
    check_count(model, images, "calibration")
    return ordinary(images.to(dtype_of(model)))


def _check_takes(model: nn.Module, samples: Tensor, shapes: str) -> None:
    """Checks that a network takes samples of a shape that its convolutions do not tell of: it may change it on the way.

    Raises:
        SharefoldError: it does not, or it takes the first axis for something else than samples.
    """
    what = f"calibration: {tuple(samples.shape)} {samples.dtype} is no float tensor of {shapes}"
    # Of three or four axes a convolution may take the first one for channels, and so may one of signals of two.
    if samples.dim() in (1, 3, 4) or (samples.dim() == 2 and len(samples) == 1 and 3 in input_shapes(model)):
        raise SharefoldError(f"{what}: pass normalised ones")
    for count in (1, 2):
        few = samples[:count].to(dtype_of(model))
        said, error = tried(model, few)
        if error:
            raise SharefoldError(f"{what}, and {type(model).__name__} fails on it ({error}): pass what it takes")
        if not any(tensor.dim() > 0 and len(tensor) == len(few) for tensor in tensors_of(said).values()):
            raise SharefoldError(f"{what}, and {type(model).__name__} does not give one answer a sample: pass what it takes")
