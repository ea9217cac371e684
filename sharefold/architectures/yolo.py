"""Networks of ultralytics, an optional package: by the name of a configuration that it ships.

``yolo:yolov8n``, ``yolo:yolo11s-seg:num_classes=3``: detectors, segmenters, pose estimators, oriented boxes and classifiers whose
size is a letter of the name. Weights are never fetched; a trained file is opened as any pickle is, with the user's consent.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharefold.architectures.arguments import close_matches
from sharefold.architectures.optional import installed
from sharefold.errors import SharefoldError
from sharefold.untrusted import is_int, shown

PACKAGE = "ultralytics"
_CLASSES = {
    "detect": "DetectionModel", "segment": "SegmentationModel", "classify": "ClassificationModel", "pose": "PoseModel",
    "obb": "OBBModel",
}  # fmt: skip
# The package names every class, and runs an image of so many channels while it builds.
_MOST = {"num_classes": 1 << 16, "in_chans": 256}
_SIDES = {"classify": 224, "obb": 1024}  # what the published ones were trained with; all others with 640
# yolov8-seg.yaml and the sizes that stand in it: yolov8n-seg, yolov8s-seg, ...
_NAMED = re.compile(r"(yolov?\d+)((?:-(?:seg|cls|pose|obb|p2|p6))*)")
_SIZES = re.compile(r"^scales:.*\n((?:[ \t]+.*\n|[ \t]*#.*\n|\n)*)", re.M)


@cache
def _shipped() -> dict[str, tuple[Path, str]]:
    """Name -> configuration file of the package, and size; empty where it is missing."""
    spec = find_spec(PACKAGE) if installed(PACKAGE) else None
    found: dict[str, tuple[Path, str]] = {}
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder, "cfg", "models").rglob("*.yaml")):
            named, scales = _NAMED.fullmatch(file.stem), _SIZES.search(file.read_text(encoding="utf-8"))
            for size in re.findall(r"^\s+([a-z]):", scales[1], re.M) if named and scales else ():
                found[f"{named[1]}{size}{named[2]}"] = file, size  # type: ignore[index]
    return found


def names() -> list[str]:
    """Networks with a size, sorted; none where the package is missing."""
    return sorted(_shipped())


def check_network(name: str) -> None:
    """Refuses what is no network of the package.

    Raises:
        SharefoldError: unknown name, or the package is missing.
    """
    if not installed(PACKAGE):
        raise SharefoldError(f"yolo:{shown(name)} needs ultralytics: pip install ultralytics")
    if name not in names():
        hint = close_matches(name, names()) or "write for example yolo:yolov8n"
        raise SharefoldError(f"unknown model yolo:{shown(name)}: {hint}")


def build_network(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The network with random weights; bad arguments raise whatever the package raises."""
    unknown = sorted(set(kwargs) - set(_MOST))
    if unknown:
        raise TypeError(f"unexpected arguments {', '.join(unknown)}: num_classes and in_chans are known")
    for key, value in kwargs.items():
        if not is_int(value) or not 1 <= value <= _MOST[key]:
            raise ValueError(f"{key} must be a whole number from 1 to {_MOST[key]}")
    file, size = _shipped()[name]
    with _aside():
        tasks, utils, yaml = (_module(part) for part in (f"{PACKAGE}.nn.tasks", f"{PACKAGE}.utils", "yaml"))
        # Not by the package's own reader: it looks in the current folder first, and expressions of such a file are evaluated.
        config = {**yaml.safe_load(file.read_text(encoding="utf-8")), "scale": size, "yaml_file": f"{name}.yaml"}
        task = tasks.guess_model_task(config)
        made = getattr(tasks, _CLASSES[task])
        model = made(config, ch=kwargs.get("in_chans", 3), nc=kwargs.get("num_classes"), verbose=False)
        # As ultralytics' own YOLO leaves it, so that YOLO(...).model may be exchanged for this one.
        model.task, model.args = task, dict(utils.DEFAULT_CFG_DICT)
    return model


def is_network(model: nn.Module) -> bool:
    return type(model).__module__.startswith(f"{PACKAGE}.") and isinstance(getattr(model, "yaml", None), Mapping)


def recipe_of(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a network of the package that is in memory; the name may be one that nobody ships."""
    config: Any = model.yaml
    kwargs: dict[str, Any] = {"num_classes": config.get("nc")}
    channels = config.get("channels", config.get("ch", 3))
    return Path(str(config.get("yaml_file", ""))).stem, {**kwargs, **({} if channels == 3 else {"in_chans": channels})}


def preprocessing_of(model: nn.Module) -> dict[str, Any]:
    """Pixels from 0 to 1, square; the side is that of its training where it is known."""
    side = None
    arguments = getattr(model, "args", None)
    if isinstance(arguments, Mapping):
        side = arguments.get("imgsz") if arguments.get("imgsz") != 640 else None
    if not isinstance(side, int) or side < 1:
        side = _SIDES.get(str(getattr(model, "task", "")), 640)
    zeros, ones = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return {"input_size": (3, side, side), "mean": zeros, "std": ones, "interpolation": "bilinear", "crop_pct": 1.0}


def _module(name: str) -> Any:
    """Imported on the CPU, wherever the caller builds: classes of the package hold tensors, which meta would leave empty."""
    with torch.device("cpu"):
        return importlib.import_module(name)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """The package greets on stdout, where machines read our JSON, and looks for its servers when it is imported."""
    before = os.environ.get("YOLO_OFFLINE")
    os.environ["YOLO_OFFLINE"] = "true"
    log = logging.getLogger(PACKAGE)
    level = log.level
    try:
        with contextlib.redirect_stdout(sys.stderr):
            _module(PACKAGE)  # which sets its level
            level = log.level
            log.setLevel(logging.ERROR)
            yield
    finally:
        log.setLevel(level)
        if before is None:
            del os.environ["YOLO_OFFLINE"]
        else:
            os.environ["YOLO_OFFLINE"] = before
