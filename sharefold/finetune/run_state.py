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
from sharefold.sources.pickles import check_sizes, is_archive
from sharefold.sources.read import check_archive
from sharefold.untrusted import is_int, is_number, shown

STATE_VERSION = 1
# Settings that may differ when a run goes on: they change where and how often, not what.
FREE = {"device", "workers", "checkpoint_steps", "checkpoint_minutes", "log_steps", "tensorboard", "compile",
        "cuda_graphs", "find_unused", "eval_epochs"}  # fmt: skip


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
        if not is_archive(path):
            raise ValueError("no archive")
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
    best = state["best"] or {"weights": {}}
    for tensors in (state["model"], state["ema"] or {}, best["weights"]):
        check_finite(tensors, f"the run state {path}", "remove it to start anew")
    return state


def _count(value: Any) -> bool:
    return is_int(value) and 0 <= value < 1 << 53


def _number(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e300


def _share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _positive(value: Any) -> bool:
    return _number(value) and 0 <= value < 1e12


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _number(number) for k, number in value.items())


def _settings(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return all(_setting(part) for v in value.values() for part in (v if isinstance(v, (list, tuple)) else [v]))


def _setting(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or _number(value)


def _tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _scores(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"model", "teacher"} and all(
        score is None or _share(score) for score in value.values()
    )


def _best(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and _share(value.get("top1")) and _tensors(value.get("weights")))


def _shapes(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(s, list) and all(map(is_int, s)) for s in value.values())


def _records(value: Any) -> bool:
    return isinstance(value, list) and all(map(_record, value))


def _record(value: Any) -> bool:
    """A record of an epoch: {epoch, step, train_loss, top1, ...}; the loss on the validation images need not be finite."""
    if not isinstance(value, dict) or not {"epoch", "step", "train_loss"} <= value.keys() or not _share(value.get("top1", 0)):
        return False
    return all(isinstance(name, str) and (_number(n) or isinstance(n, float)) for name, n in value.items())


# What a state holds: field -> what it must be, for the message, and whether a value is that.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("the run's settings", _settings),
    "images": ("a count", _count),
    "shapes": ("the shapes of the model's tensors", _shapes),
    "updates": ("a count", _count),
    "epochs_done": ("a count", _count),
    "logged_at": ("a count", _count),
    "seconds": ("a number of seconds", _positive),
    "history": ("a list of records", _records),
    "before": ("the scores before", _scores),
    "last": ("numbers", _numbers),
    "epoch_loss": ("a number", _number),
    "sums": ("numbers", _numbers),
    "model": ("tensors", _tensors),
    "optimizer": ("an optimizer's state", lambda v: isinstance(v, dict) and {"state", "param_groups"} <= v.keys()),
    "scaler": ("a scaler's state", lambda v: _numbers(v) and v.get("scale", 1) > 0),
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
                f"{path}: resume: {name} was {shown(before.get(name))} and is now {shown(now.get(name))}: use the run's own "
                "settings, or start anew with --force"
            )
    if state["images"] != images:
        raise SharefoldError(f"{path}: resume: the run had {state['images']} training images, now there are {images}")
    if state["shapes"] != shapes:
        raise SharefoldError(f"{path}: resume: the model has other tensors: pass the checkpoint the run began with")


def check_progress(path: Path, state: dict[str, Any], config: FinetuneConfig, steps: int) -> None:
    """Compares a state's counts with one another; ``steps`` are the updates of an epoch.

    Raises:
        SharefoldError: no run gets there.
    """
    updates, epochs, logged = state["updates"], state["epochs_done"], state["logged_at"]
    ended = updates == (epochs + 1) * steps  # all updates of an epoch that has not been validated
    wrong = [
        (updates > config.epochs * steps, "more updates than the run has"),
        (not epochs * steps <= updates <= (epochs + 1) * steps, f"{epochs} epochs done of {updates} updates"),
        (len(state["history"]) != epochs, f"{len(state['history'])} records of {epochs} epochs"),
        (logged > updates or (ended and logged < updates), "a log of other updates"),
        (logged > 0 and not {"loss", "images_per_second"} <= state["last"].keys(), "the last record is incomplete"),
        ("loss" in state["sums"] if logged == updates else "loss" not in state["sums"], "sums of other updates"),
        (state["best"] is not None and config.keep != "best", "a best score that the run does not keep"),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise SharefoldError(f"{path}: damaged run state: {what}: remove it to start anew")


def check_tensors(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Compares saved tensors with a network's own.

    Raises:
        ValueError: other names, shapes or dtypes.
    """
    if tensors.keys() != own.keys():
        raise ValueError("tensors of other names")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
            raise ValueError(f"{name} has another shape or dtype")
