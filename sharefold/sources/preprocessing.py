"""How a model wants its images: timm's configuration keys, for models of either library."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from sharefold.architectures import yolo
from sharefold.architectures.build import torchvision_urls
from sharefold.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from sharefold.untrusted import is_int


def preprocessing(model: nn.Module, base: dict[str, Any], file: str | Path | None = None) -> dict[str, Any]:
    """``input_size`` (C, H, W), ``mean`` and ``std`` (C values, for pixels in 0..1), ``interpolation``, ``crop_pct``,
    ``num_classes`` (-1 if unknown), and ``crop_mode`` where it is not the centre.

    timm models tell their own; torchvision's come from the published weights, by the name of ``file`` if it is one
    of theirs, else the default ones; ultralytics' see pixels from 0 to 1; anything else gets ImageNet's.
    """
    library, kwargs = base.get("library"), base.get("kwargs", {})
    if library == "torchvision":
        config = _of_torchvision(base["name"], Path(file).name if file else "")
    elif yolo.is_network(model):
        config = yolo.preprocessing_of(model)
    else:
        config = _of_timm(model)
    channels = kwargs.get("in_chans")
    if is_int(channels) and channels > 0:
        config = with_channels(config, channels)
    size = kwargs.get("img_size")
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) == 2 and all(is_int(side) and side > 0 for side in sides):
        config["input_size"] = (config["input_size"][0], *sides)
    config["num_classes"] = kwargs.get("num_classes", class_count(model))
    return config


def with_channels(config: dict[str, Any], channels: int) -> dict[str, Any]:
    """The configuration for another number of input channels: mean and std are averaged when it differs."""
    config = dict(config)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        values = config[key]
        if len(values) != channels:
            config[key] = (sum(values) / len(values),) * channels
    return config


def class_count(model: nn.Module) -> int:
    """Outputs of the classifier: the model's own ``num_classes``, else the rows of its last linear layer, else -1."""
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return last[0].out_features if last else -1


def _of_timm(model: nn.Module) -> dict[str, Any]:
    own = getattr(model, "pretrained_cfg", None)
    given = dict(own) if isinstance(own, dict) else {}
    mode = given.get("crop_mode") or "center"
    return {
        "input_size": tuple(given.get("input_size") or (3, 224, 224)),
        "mean": tuple(given.get("mean") or IMAGENET_MEAN),
        "std": tuple(given.get("std") or IMAGENET_STD),
        "interpolation": given.get("interpolation") or "bicubic",
        "crop_pct": given.get("crop_pct") or 0.875,
        **({} if mode == "center" else {"crop_mode": mode}),  # what is usual takes no place in a file
    }


def _of_torchvision(name: str, file: str) -> dict[str, Any]:
    published = torchvision_urls(name)
    weights = published.get(file)
    if weights is None and published:
        weights = importlib.import_module("torchvision.models").get_model_weights(name).DEFAULT
    preset = weights.transforms() if weights is not None else None
    resize = _size(getattr(preset, "resize_size", None))
    crop = _size(getattr(preset, "crop_size", None)) or resize
    plain = preset is not None and not hasattr(preset, "mean")  # detection: the network normalises by itself
    return {
        "input_size": (3, crop or 224, crop or 224),
        "mean": (0.0,) * 3 if plain else tuple(getattr(preset, "mean", IMAGENET_MEAN)),
        "std": (1.0,) * 3 if plain else tuple(getattr(preset, "std", IMAGENET_STD)),
        "interpolation": getattr(getattr(preset, "interpolation", None), "value", "bilinear"),
        "crop_pct": crop / resize if crop and resize else 0.875,
    }


def _size(value: Any) -> int | None:
    if isinstance(value, list | tuple):
        return int(value[0]) if value else None
    return value if isinstance(value, int) else None
