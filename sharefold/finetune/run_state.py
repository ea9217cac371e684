"""The saved state of a run: everything needed to go on as if nothing had happened.

One file of plain tensors and numbers that ``torch.load(weights_only=True)`` reads. It holds the student, the optimizer,
the weight average, the gradient scaler and the number of updates made. Schedule, loader position and all random draws
are functions of that number and the seed (:mod:`.seeds`), so they need no state of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharefold.checksum import check_finite
from sharefold.errors import SharefoldError
from sharefold.files import write_buffered
from sharefold.finetune.config import FinetuneConfig
from sharefold.sources.pickles import check_sizes
from sharefold.sources.read import check_archive
from sharefold.untrusted import is_int, is_number, shown

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
    write_buffered(path, lambda memory: torch.save({"version": STATE_VERSION, **state}, memory))


def read_state(path: Path) -> dict[str, Any]:
    """Reads a file of :func:`write_state`; never unpickles objects.

    Raises SharefoldError when it is no such file or of a newer version.
    """
    try:
        check_archive(path)
        check_sizes(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # torch.load raises anything on a damaged file
        kind = type(error).__name__
        raise SharefoldError(f"{path}: not a readable run state ({kind}): remove it to start anew") from None
    if not is_int(version) or version > STATE_VERSION:
        raise SharefoldError(f"{path}: written by a newer sharefold (state version {shown(version)}): upgrade sharefold")
    for name, (what, holds) in _FIELDS.items():
        if name not in state or not holds(state[name]):
            found = shown(state[name], 40) if name in state else "missing"
            raise SharefoldError(f"{path}: damaged run state: {name} must be {what}, not {found}: remove it to start anew")
    for name in ("model", "ema"):
        check_finite(state[name] or {}, f"the run state {path}", "remove it to start anew")
    return state


def _count(value: Any) -> bool:
    return is_int(value) and 0 <= value < 1 << 53


def _positive(value: Any) -> bool:
    return is_number(value) and value >= 0


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(number, (int, float)) for number in value.values())


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"model", "teacher"} and all(
        score is None or is_number(score) for score in value.values()
    )


def _best(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and is_number(value.get("top1")) and _tensors(value.get("weights")))


def _shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(s, list) and all(map(is_int, s)) for s in value.values())


def _records(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(record, dict) for record in value)


# What a state holds: field -> what it must be, for the message, and whether a value is that.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("the run's settings", lambda v: isinstance(v, dict)),
    "images": ("a count", _count),
    "shapes": ("the shapes of the model's tensors", _shapes),
    "updates": ("a count", _count),
    "epochs_done": ("a count", _count),
    "logged_at": ("a count", _count),
    "seconds": ("a number of seconds", _positive),
    "history": ("a list of records", _records),
    "before": ("the scores before", _scores),
    "last": ("numbers", _numbers),
    "epoch_loss": ("a number", is_number),
    "sums": ("numbers", _numbers),
    "model": ("tensors", _tensors),
    "optimizer": ("an optimizer's state", lambda v: isinstance(v, dict) and {"state", "param_groups"} <= v.keys()),
    "scaler": ("a scaler's state", lambda v: isinstance(v, dict)),
    "ema": ("tensors or nothing", lambda v: v is None or _tensors(v)),
    "best": ("a score with weights, or nothing", _best),
}


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
