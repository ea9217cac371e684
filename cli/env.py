"""``sharefold env``: what a bug report needs."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import click

from .common import Run, shared_options

CORE = ("torch", "torchvision", "timm", "scipy", "numpy", "click", "safetensors", "rich", "pillow")
EXTRAS: dict[str, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "train": ("accelerate", "tensorboard"),
    "plots": ("matplotlib",),
    "demo": ("scikit-learn", "matplotlib"),
    "smp": ("segmentation-models-pytorch",),
    "yolo": ("ultralytics",),
}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@click.command("env")
@shared_options
def command(run: Run) -> None:
    """Say which versions, devices and optional parts are present."""
    device = run.setup()
    import torch

    import sharefold

    packages = {name: _installed(name) for name in CORE}
    extras = {extra: {name: _installed(name) for name in names} for extra, names in EXTRAS.items()}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows: list[list[str]] = [["sharefold", sharefold.__version__], ["python", sys.version.split()[0]]]
    rows.append(["platform", platform.platform()])
    rows += [[name, found or "missing"] for name, found in packages.items()]
    for extra, parts in extras.items():
        missing = [name for name, found in parts.items() if found is None]
        rows.append([f"extra {extra}", f"missing {', '.join(missing)}" if missing else "present"])
    rows += [["device", str(device)], ["gpus", ", ".join(gpus) or "none"], ["threads", str(torch.get_num_threads())]]
    run.table(["what", "here"], rows)
    run.result(
        {
            "sharefold": sharefold.__version__,
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": packages,
            "extras": {extra: all(found for found in parts.values()) for extra, parts in extras.items()},
            "device": str(device),
            "gpus": gpus,
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
    )
