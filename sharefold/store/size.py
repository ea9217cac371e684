"""The size of the file before it is written."""

from __future__ import annotations

import copy
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sharefold.store.blob import NAME, blob_bytes, encode_blob
from sharefold.store.norms import fold_norms
from sharefold.store.spec import StoreSpec


def file_bytes(model: nn.Module, spec: StoreSpec) -> int:
    """Bytes of the single ``.safetensors`` file that ``save`` writes for ``model``, rounded and stored as ``spec`` says."""
    tensors, text = _content(model)
    return _size(encode_blob(tensors, spec), text)


def predicted_bytes(model: nn.Module, spec: StoreSpec) -> int:
    """About the bytes of that file if BatchNorms are folded and all tensors go to the nearest values that ``spec`` holds."""
    model = copy.deepcopy(model)
    fold_norms(model)
    tensors, text = _content(model)
    tensors = {n: spec.tensors[n].snapped(t) if n in spec.tensors else t for n, t in tensors.items()}
    return _size(torch.empty(blob_bytes(tensors, spec), dtype=torch.uint8), text)


def _content(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file, and its metadata."""
    from sharefold.checkpoint import distinct, file_config, pack_config

    tensors, aliases = distinct(model.state_dict())
    config: dict[str, Any] = {**file_config(model, aliases), "store": {"format": 1}}
    return tensors, pack_config(config)


def _size(blob: Tensor, text: str) -> int:
    from sharefold.checkpoint import METADATA_KEY

    return len(to_bytes({NAME: blob}, {METADATA_KEY: text, "format": "pt"}))
