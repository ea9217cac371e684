"""The saved state of a run: everything needed to go on as if nothing had happened.

One file of plain tensors and numbers that ``torch.load(weights_only=True)`` reads. It holds the student, the optimizer,
the weight average, the gradient scaler and the number of updates made. Schedule, loader position and all random draws
are functions of that number and the seed (:mod:`.seeds`), so they need no state of their own.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from sharefold.errors import SharefoldError
from sharefold.files import write_file
from sharefold.finetune.config import FinetuneConfig

STATE_VERSION = 1
# Settings that may differ when a run goes on: they change where and how often, not what.
FREE = {"device", "workers", "checkpoint_steps", "checkpoint_minutes", "log_steps", "tensorboard", "compile",
        "find_unused", "eval_epochs"}  # fmt: skip


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the file: a killed run leaves the old one or the new one.

    Raises:
        SharefoldError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SharefoldError(f"{path}: cannot be written ({error.strerror}): choose another place") from error
    memory = io.BytesIO()  # not straight to the disk: when that is full, torch's writer may end the process
    torch.save({"version": STATE_VERSION, **state}, memory)
    write_file(path, lambda temporary: temporary.write_bytes(memory.getbuffer()))


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file of :func:`write_state`; never unpickles objects.

    Raises SharefoldError when it is no such file or of a newer version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # torch.load raises anything on a damaged file
        kind = type(error).__name__
        raise SharefoldError(f"{path}: not a readable run state ({kind}): remove it to start anew") from None
    if version > STATE_VERSION:
        raise SharefoldError(f"{path}: written by a newer sharefold (state version {version}): upgrade sharefold")
    return state


def check_same_run(
    path: Path, state: dict[str, Any], config: FinetuneConfig, images: int, shapes: dict[str, list[int]]
) -> None:
    """Raises SharefoldError when the state belongs to other settings, other data or another model."""
    before, now = state["config"], config.to_dict()
    for name in sorted(set(before) | set(now)):
        if name not in FREE and before.get(name) != now.get(name):
            raise SharefoldError(
                f"{path}: resume: {name} was {before.get(name)!r} and is now {now.get(name)!r}: use the run's own "
                "settings, or start anew with --force"
            )
    if state["images"] != images:
        raise SharefoldError(f"{path}: resume: the run had {state['images']} training images, now there are {images}")
    if state["shapes"] != shapes:
        raise SharefoldError(f"{path}: resume: the model has other tensors: pass the checkpoint the run began with")
