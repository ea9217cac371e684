"""What a file holds: tensors under their names, or all of it as one tensor where that alone keeps the file from growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from sharefold.checksum import checksum
from sharefold.format import CHECKSUM_KEY, METADATA_KEY, FileConfig
from sharefold.store import container
from sharefold.store.blob import NAME, encode_blob
from sharefold.store.exact import EXACT_FORMAT, can_hold, encode_exact
from sharefold.store.plain_size import plain_bytes
from sharefold.store.short_config import config_from, short_bytes, shorter
from sharefold.store.tensor_spec import StoreSpec


@dataclass(frozen=True)
class FileContent:
    """``tensors`` and ``metadata`` of a safetensors file of ``size`` bytes that says ``config``; ``limit``: those of the original
    network's file, or fewer; 0 where nobody knows."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None
    config: FileConfig
    size: int
    limit: int


def file_content(
    config: FileConfig, tensors: Mapping[str, Tensor], spec: StoreSpec | None, alone: bool = True, plain: bool = False
) -> FileContent:  # fmt: skip
    """The content of the file.

    Args:
        config: as :meth:`FileConfig.of` gives it for ``tensors`` and the format of the blob.
        tensors: every tensor once, on the CPU, contiguous.
        spec: how they were rounded; None where they were not.
        alone: the file stands for itself, without a folder and a copy of its configuration.
        plain: tensors under their names, or rounded ones in the blob, at any size.

    Raises:
        SharefoldError: a tensor is not one that ``spec`` can hold.
    """
    limit = _limit(config, tensors)
    if spec is None:
        declared = sum(tensor.nbytes for tensor in tensors.values())
        held, text = dict(tensors), config.text_beside(declared) if alone else config.to_text()
    else:
        held, text = {NAME: encode_blob(tensors, spec)}, config.packed()
    size = plain_bytes(held, metadata_for(text))
    best = FileContent(held, None, config, size, limit)
    if size > limit and not plain and (spec is not None or can_hold(tensors)):
        best = _in_one(best, spec)
    if best.metadata is None and best.tensors is held:
        best = replace(best, metadata=metadata_for(text, checksum(text, held)))
    return best


def metadata_for(text: str, found: str = "0" * 8) -> dict[str, str]:
    """The metadata of a file with the configuration ``text`` and the checksum ``found``."""
    return {METADATA_KEY: text, CHECKSUM_KEY: found, "format": "pt"}


def _in_one(named: FileContent, spec: StoreSpec | None) -> FileContent:
    """The same as one tensor, if that is smaller: the first configuration that keeps the file below its limit, else the least."""
    config, best = named.config, named
    if spec is None:
        weights, config = encode_exact(named.tensors), replace(config, store=EXACT_FORMAT)
    else:
        weights = named.tensors[NAME].numpy().tobytes()
    # Of rounded weights the size is settled before there are metrics, which must not change it.
    for known in shorter(config, metrics=spec is None):
        text = short_bytes(known)
        whole = {container.NAME: container.packed(text, weights)}
        size = plain_bytes(whole)
        if size < best.size:
            best = FileContent(whole, None, config_from(memoryview(text), "file"), size, named.limit)
        if best.size <= named.limit:
            break
    return best


def _limit(config: FileConfig, tensors: Mapping[str, Tensor]) -> int:
    if not config.plan.groups:
        return plain_bytes(tensors)
    if config.dense_bytes:
        return config.dense_bytes
    return config.plan.params_before * min((t.itemsize for t in tensors.values() if t.is_floating_point()), default=0)
