"""What is fuzzed: functions of bytes that may raise :class:`SharefoldError` in one line, and nothing else."""

from __future__ import annotations

import io
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

import sharefold
from sharefold.architectures.arguments import parse_options
from sharefold.architectures.shapes import compare
from sharefold.data.coco import read_annotations
from sharefold.errors import SharefoldError
from sharefold.finetune.run_state import read_state
from sharefold.format import FileConfig
from sharefold.models.digits_resnet import digits_resnet
from sharefold.plans import Plan
from sharefold.sources import read_state_dict
from sharefold.sources.pickle_sizes import TooLarge, Unclear, check_pickle
from sharefold.sources.unwrap import unwrap
from sharefold.store import container
from sharefold.store.blob import decode_blob
from sharefold.store.exact import decode_exact
from sharefold.store.short_config import _DICTIONARY, config_from, short_bytes, shorter
from sharefold.untrusted import is_int

_PLACE = Path(tempfile.mkdtemp(prefix="sharefold-fuzz-"))
_TEMPLATE = {"a.weight": torch.empty(3, 2, 1, 1), "a.bias": torch.empty(3), "count": torch.empty((), dtype=torch.int64)}
_NETWORK = digits_resnet().eval()


def _file(name: str, data: bytes) -> Path:
    path = _PLACE / name
    path.write_bytes(data)
    return path


def config(data: bytes) -> None:
    FileConfig.from_text(data.decode("utf-8", "replace"), "file").packed()


def plan(data: bytes) -> None:
    str(Plan.from_json(data.decode("utf-8", "replace")))


def header(data: bytes) -> None:
    sharefold.load(_file("net.safetensors", data))


def blob(data: bytes) -> None:
    if data:
        decode_blob(torch.frombuffer(bytearray(data), dtype=torch.uint8), _TEMPLATE)


def exact(data: bytes) -> None:
    if data:
        decode_exact(memoryview(data), _TEMPLATE)


def short_config(data: bytes) -> None:
    """As a deflate stream, and as the text in one."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, _DICTIONARY)
    for stream in (squeeze.compress(data) + squeeze.flush(), data):
        for form in shorter(config_from(memoryview(stream), "file")):
            short_bytes(form)


def one_tensor(data: bytes) -> None:
    """What follows the checksum of a file that is one tensor, for a network in a registry."""
    head = bytes([container.VERSION]) + zlib.crc32(data).to_bytes(4, "little")
    content = torch.frombuffer(bytearray(head + data), dtype=torch.uint8)
    save_file({container.NAME: content}, str(_PLACE / "one.safetensors"))
    sharefold.load(_PLACE / "one.safetensors")


def state_dict(data: bytes) -> None:
    """JSON as a nest of dictionaries in which a list is a tensor of that shape, then compared with a network."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return

    def built(value: object) -> object:
        if isinstance(value, dict):
            return {key: built(part) for key, part in value.items()}
        if isinstance(value, list) and all(is_int(n) and 0 <= n < 50 for n in value) and len(value) < 5:
            return torch.empty(value)
        return value

    state, _ = unwrap(built(found), "file")
    if isinstance(state, dict):
        str(compare({name: tuple(t.shape) for name, t in state.items()}, _NETWORK))


def checkpoint(data: bytes) -> None:
    read_state_dict(_file("net.pt", data))


def pickled(data: bytes) -> None:
    try:
        check_pickle(io.BytesIO(data), len(data))
    except (TooLarge, Unclear):
        return


def run_state(data: bytes) -> None:
    read_state(_file("state.pt", data))


def annotations(data: bytes) -> None:
    read_annotations(_file("truth.json", data), [Path("0.png")]).objects(0, (20, 40))


def options(data: bytes) -> None:
    parse_options(data.decode("utf-8", "replace"), "timm:x")


TARGETS: dict[str, Callable[[bytes], None]] = {
    "config": config, "plan": plan, "header": header, "blob": blob, "exact": exact,
    "short_config": short_config, "one_tensor": one_tensor, "state_dict": state_dict, "checkpoint": checkpoint,
    "pickled": pickled, "run_state": run_state, "options": options, "annotations": annotations,
}  # fmt: skip


def check(name: str, data: bytes) -> None:
    """Runs one target; anything but a result or a refusal in one line is a finding."""
    try:
        TARGETS[name](data)
    except SharefoldError as error:
        assert "\n" not in str(error), str(error)
