"""Small types in the file: rounding under the data norm, packing, entropy coding, and the size before it is written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sharefold.errors import SharefoldError
from sharefold.store.blob import NAME, decode_blob, encode_blob
from sharefold.store.exact import EXACT_FORMAT, decode_exact
from sharefold.store.fake import fake_quantize
from sharefold.store.quantize import StoreReport, plan_store, quantize_
from sharefold.store.size import file_bytes
from sharefold.store.specs_for import snap_
from sharefold.store.tensor_spec import StoreRequest, StoreSpec, TensorSpec, parse_store

__all__ = [
    "StoreReport", "StoreRequest", "StoreSpec", "TensorSpec", "decode", "encode", "fake_quantize", "file_bytes",
    "parse_store", "plan_store", "quantize_", "snap_",
]  # fmt: skip


def encode(tensors: Mapping[str, Tensor], spec: StoreSpec) -> dict[str, Tensor]:
    """The tensors of the file for a state dict that ``quantize_`` rounded to ``spec``.

    Raises:
        SharefoldError: a tensor changed since it was rounded.
    """
    return {NAME: encode_blob(tensors, spec)}


def decode(tensors: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], StoreSpec | None]:
    """The state dict behind :func:`encode`, and its spec for saving again; None for tensors that were packed as they were.

    Args:
        tensors: what the file holds.
        template: names, shapes and types of the network's state dict, without aliases.

    Raises:
        SharefoldError: damaged, or of another structure.
    """
    blob = tensors.get(NAME)
    if blob is None or blob.dim() != 1 or str(blob.dtype) != "torch.uint8":
        raise SharefoldError("store: the file holds no packed weights: it is damaged")
    if blob.numel() and int(blob[0]) == EXACT_FORMAT:
        return decode_exact(blob.numpy().data, template), None
    return decode_blob(blob, template)
