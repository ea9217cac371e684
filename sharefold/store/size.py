"""The size of the file before it is written."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import nn

from sharefold.store.blob import NAME, encode_blob
from sharefold.store.norms import fold_norms
from sharefold.store.spec import StoreSpec


def file_bytes(model: nn.Module, spec: StoreSpec, *, snapped: bool = False, folded: bool = False) -> int:
    """Bytes of the single ``.safetensors`` file that ``save`` writes for ``model`` stored as ``spec`` says.

    Args:
        snapped: predict for the nearest values on the grid instead of the tensors as they are.
        folded: predict for folded BatchNorms.
    """
    import copy

    from sharefold.checkpoint import METADATA_KEY, distinct, file_config, pack_config

    if folded:
        model = copy.deepcopy(model)
        fold_norms(model)
    tensors, aliases = distinct(model.state_dict())
    if snapped:
        tensors = {n: spec.tensors[n].snapped(t) if n in spec.tensors else t for n, t in tensors.items()}
    config: dict[str, Any] = {**file_config(model, aliases), "store": {"format": 1}}
    text = pack_config(config)
    json.dumps(text)
    blob: torch.Tensor = encode_blob(tensors, spec)
    return len(to_bytes({NAME: blob}, {METADATA_KEY: text, "format": "pt"}))
