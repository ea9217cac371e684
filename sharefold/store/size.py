"""The size of the file before it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sharefold.format import CHECKSUM_KEY, METADATA_KEY, config_of, distinct
from sharefold.store.blob import NAME, blob_bytes, encode_blob
from sharefold.store.norm_absorption import absorb_statistics
from sharefold.store.tensor_spec import FORMAT, StoreSpec


def file_bytes(model: nn.Module, spec: StoreSpec) -> int:
    """Bytes of the single ``.safetensors`` file that ``save`` writes for ``model``, which lies on the grids of ``spec``.

    Raises:
        SharefoldError: a tensor is not one that ``spec`` can hold: :func:`quantize_` (or ``snap_``) first.
    """
    tensors, text = _content(model)
    return _size(encode_blob(tensors, spec), text)


def size_predictor(model: nn.Module) -> Callable[[StoreSpec], int]:
    """About the bytes of that file, for any spec, if BatchNorms absorb their statistics and all tensors go to the nearest
    values that the spec holds. What does not depend on the spec is done here, once."""
    model = copy.deepcopy(model)
    absorb_statistics(model)
    tensors, text = _content(model)
    rest = _size(torch.empty(0, dtype=torch.uint8), text)

    def predicted(spec: StoreSpec) -> int:
        nearest = {n: spec.tensors[n].snapped(t) if n in spec.tensors else t for n, t in tensors.items()}
        return rest + blob_bytes(nearest, spec)

    return predicted


def _content(model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file, and its metadata."""
    tensors, aliases = distinct(model.state_dict())
    return tensors, config_of(model).of(tensors, aliases, FORMAT).packed()


def _size(blob: Tensor, text: str) -> int:
    return len(to_bytes({NAME: blob}, {METADATA_KEY: text, CHECKSUM_KEY: "0" * 8, "format": "pt"}))
