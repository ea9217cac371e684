"""Saved networks on the Hugging Face Hub: a directory that ``save`` wrote is a model repository as it stands."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharefold.checkpoint import load, read_config
from sharefold.errors import SharefoldError
from sharefold.format import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from sharefold.offline import offline_when_unreachable
from sharefold.running import usable_device
from sharefold.untrusted import first_line

__all__ = ["load_from_hub", "push_to_hub"]
FILES = (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME)


def push_to_hub(
    path: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None,
    commit_message: str = "Upload a network shared by sharefold", create: bool = True,
) -> str:  # fmt: skip
    """Uploads a directory that :func:`sharefold.save` wrote: weights, configuration and model card, nothing else.

    Args:
        path: the directory.
        repo_id: ``owner/name``.
        private: of a repository that this call creates; None takes the owner's default.
        token: access token; by default the one that ``hf auth login`` stored.
        create: make the repository where it does not exist.

    Returns:
        The address of the commit.

    Raises:
        SharefoldError: not a sharefold directory, or the Hub refuses or cannot be reached.
    """
    folder = Path(path)
    read_config(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SharefoldError(f"{folder} lacks {', '.join(missing)}: save the network as a directory, not as one file")
    api = importlib.import_module("huggingface_hub").HfApi(token=token)

    def upload() -> Any:
        if create:
            api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, repo_type="model", commit_message=commit_message,
            allow_patterns=list(FILES),
        )  # fmt: skip

    done = _hub(upload, f"{repo_id} could not be written")
    return str(getattr(done, "commit_url", done))


def load_from_hub(
    repo_id: str, *, revision: str | None = None, token: str | None = None, model: nn.Module | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:  # fmt: skip
    """Downloads (or takes from the cache) a repository that :func:`push_to_hub` wrote, and loads it.

    Raises:
        SharefoldError: not reachable, not of sharefold, or as :func:`sharefold.load`.
    """
    device = usable_device(device)
    return load(_snapshot(repo_id, revision, token), model=model, device=device)


def shared_folder(identifier: str) -> Path | None:
    """A local copy of the repository ``owner/name[@revision]``, or None where :func:`push_to_hub` did not write it.

    One small file tells which it is. Without a network the cache is asked, and what it lacks counts as not written.

    Raises:
        SharefoldError: no such repository or revision, no access to it, or the download failed.
    """
    hub, errors = importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.errors")
    repo_id, _, revision = identifier.partition("@")

    def marked() -> bool:
        try:
            hub.hf_hub_download(repo_id, CONFIG_NAME, revision=revision or None)
        except errors.EntryNotFoundError:  # also what is not in the cache of a machine without a network
            return False
        return True

    with offline_when_unreachable():
        if not _hub(marked, f"{identifier} could not be read"):
            return None
        return _snapshot(repo_id, revision or None)


def _snapshot(repo_id: str, revision: str | None, token: str | None = None) -> Path:
    hub = importlib.import_module("huggingface_hub")

    def fetch() -> str:
        return hub.snapshot_download(repo_id, revision=revision, token=token, allow_patterns=list(FILES))

    return Path(_hub(fetch, f"{repo_id} could not be read"))


def _hub(call: Callable[[], Any], what: str) -> Any:
    try:
        return call()
    except Exception as error:
        raise SharefoldError(f"Hugging Face Hub: {what}: {first_line(error)}") from error
