"""Files of sharefold, changed on purpose: with a checksum that holds, so that only what is tested is wrong."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sharefold.checksum import checksum
from sharefold.store import container, short_config

METADATA, CHECKSUM, WEIGHTS, CONFIG = "sharefold", "crc32", "model.safetensors", "sharefold_config.json"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as handle:
        return dict(handle.metadata() or {})


def parts_of(file: Path) -> tuple[bytes, bytes]:
    """Configuration, unpacked, and tensors of a file that is one tensor."""
    config, weights = container.unpacked(load_file(file)[container.NAME], str(file))
    return zlib.decompressobj(-15, zdict=short_config._DICTIONARY).decompress(config), weights.numpy().tobytes()


def one_tensor(file: Path, text: bytes, weights: bytes) -> None:
    """Writes such a file, with a checksum over it."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, short_config._DICTIONARY)
    config = squeeze.compress(text) + squeeze.flush()
    save_file({container.NAME: container.packed(config, weights)}, str(file))


def is_one_tensor(file: Path) -> bool:
    return list(load_file(file)) == [container.NAME]


def config_text(file: Path) -> str:
    """The configuration of a file, unpacked where it is compressed."""
    if is_one_tensor(file):
        return parts_of(file)[0].decode()
    text = metadata_of(file)[METADATA]
    return zlib.decompress(base64.b85decode(text.removeprefix("zlib85:").rstrip())).decode() if text[0] == "z" else text


def reseal(file: Path, tensors: Mapping[str, torch.Tensor] | None = None, text: str | None = None, **extra: str) -> None:
    """Writes ``file`` anew with other tensors or another configuration, and a checksum over them."""
    if tensors is None and is_one_tensor(file):
        one_tensor(file, parts_of(file)[0] if text is None else text.encode(), parts_of(file)[1])
        return
    tensors = dict(load_file(file) if tensors is None else tensors)
    metadata = metadata_of(file)
    text = metadata.get(METADATA, "") if text is None else text
    save_file(tensors, str(file), {**metadata, METADATA: text, CHECKSUM: checksum(text, tensors), **extra})


def edit_config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the configuration of a directory or file, in each place where it stands."""
    file = path / WEIGHTS if path.is_dir() else path
    config = {"format_version": 1, "checksum": "crc32", **json.loads(config_text(file))}  # one tensor leaves these out
    change(config)
    reseal(file, text=json.dumps(config))
    if path.is_dir():
        (path / CONFIG).write_text(json.dumps(config))


def old_file(file: Path) -> None:
    """As sharefold wrote it before files had a checksum."""
    metadata = metadata_of(file)
    config = json.loads(metadata.pop(METADATA))
    config.pop("checksum", None)
    tensors = load_file(file)
    save_file(tensors, str(file), {METADATA: json.dumps(config), "format": "pt"})
