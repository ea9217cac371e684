"""The recipe of the dense architecture behind a network that is already in memory."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from sharefold.architectures import segmentation, yolo
from sharefold.architectures.build import BASE_NOTE, SOURCE_PREFIXES, build_on_meta, make_base
from sharefold.architectures.matching import exact_match
from sharefold.architectures.sameness import same_answers, same_code
from sharefold.architectures.shapes import shapes_of
from sharefold.errors import SharefoldError
from sharefold.inputs import Input
from sharefold.state_dicts import tensor_state

# Dropout of any kind is no part of what a network computes at evaluation, and builders' rates are not in the shapes.
_DROP = re.compile(r"\(?\w*drop\w*\)?: .*|Drop\w+\([^)]*\)", re.I)
_LIBRARIES = {prefix: library for library, prefix in SOURCE_PREFIXES.items()}


def base_of(model: nn.Module, example: Input | None = None) -> dict[str, Any] | None:
    """How :func:`build_base` rebuilds ``model``'s architecture, or None when no registry has it.

    What :func:`build_base` or :func:`open_source` noted on the model comes first, with the builder's arguments that
    neither a name nor shapes tell. Any candidate counts only when its modules are of the same classes and print the
    same, its tensors have the same shapes, and with the model's weights it says the same: equal shapes with other strides
    or activations are not mistaken for it, and a network that was changed after it was built is not taken for what it was.

    Args:
        model: left exactly as it was.
        example: (n, C, H, W), or what else it takes, on which both are run; by default noise of the model's own image size.
    """
    tensors = tensor_state(model)
    printed, shapes = _printed(model), shapes_of(tensors)
    for base in _candidates(model):
        try:
            built = build_on_meta(base)
        except SharefoldError:
            continue
        if type(built) is not type(model) or _printed(built) != printed or shapes_of(built.state_dict()) != shapes:
            continue
        if same_code(model, built) and same_answers(model, base, tensors, example):
            return base
    return None


def _candidates(model: nn.Module) -> list[dict[str, Any]]:
    found = []
    noted = getattr(model, BASE_NOTE, None)
    if isinstance(noted, dict):
        found.append(copy.deepcopy(noted))
    config = getattr(model, "config", None)
    if type(model).__module__.startswith(f"{segmentation.PACKAGE}.") and isinstance(config, Mapping):
        found.append(make_base("smp", type(model).__name__.lower(), segmentation.known_arguments(dict(config))))
    if yolo.is_network(model):
        found.append(make_base("ultralytics", *yolo.recipe_of(model)))
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    if name:
        kwargs: dict[str, Any] = {}
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int):
            kwargs["num_classes"] = classes
        first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
        found.append(make_base("timm", str(name), kwargs))
        if first is not None and first.in_channels != 3:
            found.append(make_base("timm", str(name), {**kwargs, "in_chans": first.in_channels}))
    match = exact_match(shapes_of(tensor_state(model)), "")
    if match is not None:
        found.append(match.base)
        for label in match.others:  # equal shapes in the other library
            library, _, rest = label.partition(":")
            same = {**match.base, "library": _LIBRARIES[library], "name": rest.split(":")[0]}
            found.append(same)
    if isinstance(transform := getattr(model, "transform_input", None), bool):  # of torchvision's GoogLeNet and Inception
        found += [{**base, "kwargs": {**base["kwargs"], "transform_input": transform}} for base in found]
    return found


def _printed(model: nn.Module) -> str:
    return _DROP.sub("", str(model))
