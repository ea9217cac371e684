"""The size of the file before it is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sharefold.format import FileConfig, config_of, distinct
from sharefold.state_dicts import tensor_state
from sharefold.store.blob import NAME, blob_bytes
from sharefold.store.file_content import file_content, metadata_for
from sharefold.store.norm_absorption import Gain, absorb_statistics, take_up
from sharefold.store.plain_size import plain_bytes
from sharefold.store.prepare import plan_of
from sharefold.store.tensor_spec import FORMAT, StoreSpec


def file_bytes(model: nn.Module, spec: StoreSpec) -> int:
    """Bytes of the single ``.safetensors`` file that ``save`` writes for ``model``, which lies on the grids of ``spec``.

    Raises:
        SharefoldError: a tensor is not one that ``spec`` can hold: :func:`quantize_` (or ``snap_``) first.
    """
    config, tensors = _content(model)
    return file_content(config, tensors, spec).size


def size_predictor(model: nn.Module, gains: Mapping[str, Gain]) -> Callable[[StoreSpec], int]:
    """About the bytes of that file, for any spec, if BatchNorms absorb their statistics, ``gains`` go into the layers, and all
    tensors go to the nearest values that the spec holds. What does not depend on the spec is done here, once."""
    model = copy.deepcopy(model)
    absorb_statistics(model, plan_of(model))
    for gain in gains.values():
        take_up(model, gain)  # rows and their steps grow alike: the codes stay
    config, tensors = _content(model)
    rest = plain_bytes({NAME: torch.empty(0, dtype=torch.uint8)}, metadata_for(config.packed()))

    def predicted(spec: StoreSpec) -> int:
        nearest = {n: spec.tensors[n].snapped(t) if n in spec.tensors else t for n, t in tensors.items()}
        return rest + blob_bytes(nearest, spec)

    return predicted


def _content(model: nn.Module) -> tuple[FileConfig, dict[str, Tensor]]:
    tensors, aliases = distinct(tensor_state(model))
    return config_of(model).of(tensors, aliases, FORMAT), tensors
