"""A safetensors file that is the same to the byte for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

_LENGTH = 8  # bytes of the header's length in front of it, little-endian


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes as :func:`safetensors.torch.save_file` does, metadata in the order of their keys.

    The library keeps metadata in a hash map and writes them in another order in every process, so that equal conversions would
    have files of different hashes. Only the header is read and written again; its length, and all that follows, stay.
    """
    save_file(dict(tensors), str(path), None if metadata is None else dict(metadata))
    if not metadata:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(metadata.items())), **{k: v for k, v in header.items() if k != "__metadata__"}}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # else the library writes JSON shorter than Python does: the file is good as it is
            file.seek(_LENGTH)
            file.write(text.ljust(length))
