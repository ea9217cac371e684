"""What a file of sharefold says: names, the configuration and its checks, and how it is packed.

A file is one ``.safetensors`` whose metadata holds the configuration as JSON text; a directory holds the same text once
more as ``sharefold_config.json``, for people and for the Hub. Everything here may come from a stranger, so every field
is checked when it is read, and no text is inflated beyond ``JSON_LIMIT``.
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.checksum import ALGORITHM
from sharefold.data.preprocess import CROP_MODES, INTERPOLATIONS, LEAST_CROP, MOST_CROP, SIZES, is_size
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.metrics import short_metrics
from sharefold.ownership import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from sharefold.plans import Plan
from sharefold.repair.step_record import StepRecord, steps_from
from sharefold.untrusted import JSON_LIMIT, is_int, is_number, parse_json, read_text, shown
from sharefold.version import __version__

__all__ = ["CARD_NAME", "CONFIG_NAME", "FORMAT_VERSION", "METADATA_KEY", "WEIGHTS_NAME", "FileConfig"]

FORMAT_VERSION = 1
METADATA_KEY = "sharefold"
CHECKSUM_KEY = "crc32"
# Characters for all metrics that packed files keep.
_METRICS_ROOM = 96
# Metrics that were measured of a network's answers.
FIGURES = (
    "agreement", "agreement_interval", "report_images", "seen_before", "new_agreement", "new_agreement_interval", "kl", "outputs",
    "top1", "top5", "loss",
)  # fmt: skip
SMALL_FILE = 1 << 16  # bytes of tensors beside which a configuration is compressed
PACKED = "zlib85:"  # before a configuration that is compressed and in base 85
_ATTRIBUTE = "sharefold_config"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class FileConfig:
    """The configuration of a saved network, checked; ``convert_`` and ``load`` leave one on the model.

    Attributes:
        plan: what each group of layers shares.
        base: recipe of the stock architecture (``library``, ``name``, ``kwargs``); None for a network of the user's own.
        pretrained_cfg: how the network wants its images, timm's keys; {} where nobody said.
        metrics: JSON values that were measured.
        aliases: name of a tensor that the network itself ties -> name of the tensor in the file.
        store: format of packed weights; None for plain tensors.
        dtypes: of packed weights: types of floating tensors other than float32 by name, "" for all that are not named.
        checksum: how the file's metadata tells damage, "crc32"; "" for files of sharefold before it did.
        sharefold_version: what wrote the file.
        steps: what the steps of the conversion did, without details; () for files of sharefold before it told, and for single
            files of packed weights, which have no room for it.
        dense_bytes: bytes of the original network as a safetensors file, 0 where nobody looked; not in the file.
    """

    plan: Plan
    base: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    store: int | None = None
    dtypes: dict[str, str] = field(default_factory=dict)
    checksum: str = ""
    sharefold_version: str = __version__
    steps: tuple[StepRecord, ...] = ()
    dense_bytes: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON values as the file holds them; what is empty is left out, but for ``base``, whose absence is a statement."""
        known = {key: getattr(self, key) for key in ("pretrained_cfg", "metrics") if getattr(self, key)}
        types = {"dtypes": self.dtypes} if self.dtypes else {}
        store = {} if self.store is None else {"store": {"format": self.store, **types}}
        check = {"checksum": self.checksum} if self.checksum else {}
        steps = {"steps": [step.compact() for step in self.steps]} if self.steps else {}
        return {
            "format_version": FORMAT_VERSION, "sharefold_version": self.sharefold_version, "base": self.base,
            "plan": self.plan.to_dict(), **known, **steps, "aliases": self.aliases, **store, **check,
        }  # fmt: skip

    def to_text(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def text_beside(self, tensor_bytes: int) -> str:
        """:meth:`to_text`, compressed where it would be a good part of a file with so many bytes of tensors."""
        return _packed(self) if tensor_bytes < SMALL_FILE else self.to_text()

    def packed(self) -> str:
        """The configuration in few characters: a plan as plain JSON would be a tenth of a small network's file.

        Always the same number of them: ``metrics`` come after the size of the file was settled and must not change it, so
        there is room for a few, and blanks are what they leave of it.
        """
        bare = replace(self, metrics={}, steps=())
        least = len(_packed(bare))
        kept: dict[str, Any] = {}
        for key, value in short_metrics(self.metrics).items():
            if len(_packed(replace(bare, metrics={**kept, key: value}))) <= least + _METRICS_ROOM:
                kept[key] = value
        return _packed(replace(bare, metrics=kept)).ljust(least + _METRICS_ROOM)

    def of(self, tensors: Mapping[str, Tensor], aliases: dict[str, str], store: int | None) -> FileConfig:
        """The configuration of a file that holds ``tensors``, packed when ``store`` is a format."""
        kinds = {} if store is None else _types_of(tensors)
        return replace(
            self, aliases=aliases, store=store, dtypes=kinds, checksum=ALGORITHM, sharefold_version=__version__
        )

    def typed(self, template: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that packed weights are unpacked to, in the types that they had: ``template`` without aliases."""
        return {
            name: like.to(_DTYPES[self.dtypes.get(name, self.dtypes.get("", "float32"))])
            if like.is_floating_point() and self.dtypes else like
            for name, like in template.items() if name not in self.aliases
        }  # fmt: skip

    @classmethod
    def from_text(cls, text: str, where: str | Path) -> FileConfig:
        """Reads :meth:`to_text`, :meth:`text_beside` or :meth:`packed`.

        Raises:
            SharefoldError: too large, damaged, no JSON, of a newer format, or a field that is not what it must be.

        Warns:
            SharefoldWarning: unknown keys, which are ignored.
        """
        return cls.from_dict(parse_json(_unpacked(text, where), f"{where}: its configuration"), where)

    @classmethod
    def from_dict(cls, data: Any, where: str | Path) -> FileConfig:
        """As :meth:`from_text`, for JSON values."""
        if not isinstance(data, dict) or not isinstance(data.get("plan"), dict):
            raise SharefoldError(f"{where}: its configuration holds no plan: it is not a sharefold file")
        version = data.get("format_version", 0)
        if not is_int(version) or version > FORMAT_VERSION:
            raise SharefoldError(
                f"{where} has format_version {shown(version)}, this sharefold reads up to {FORMAT_VERSION}: upgrade sharefold"
            )
        known = {"format_version", *(entry.name for entry in fields(cls) if entry.compare)}
        unknown = sorted(data.keys() - known)
        if unknown:
            warnings.warn(
                f"{where}: unknown keys {shown(unknown)} in its configuration are ignored", SharefoldWarning, stacklevel=3
            )
        metrics = data.get("metrics") or {}
        if not isinstance(metrics, dict):
            raise _wrong(where, "metrics", "an object", metrics)
        writer, check = data.get("sharefold_version", ""), data.get("checksum", "")
        if not isinstance(writer, str):
            raise _wrong(where, "sharefold_version", "a text", writer)
        if check not in ("", ALGORITHM):
            raise _wrong(where, "checksum", f"{ALGORITHM} (is the file of a newer sharefold?)", check)
        return cls(
            Plan.from_dict(data["plan"], where=f"the plan in {where}"), _base(data.get("base"), where),
            checked_pretrained_cfg(data.get("pretrained_cfg"), where), metrics, _aliases(data.get("aliases"), where),
            *_store(data.get("store"), where), check, writer, steps_from(data.get("steps"), where),
        )  # fmt: skip


def config_of(model: nn.Module) -> FileConfig:
    """The configuration that ``convert_`` or ``load`` left on the model.

    Raises:
        SharefoldError: there is none.
    """
    config = carried_config(model)
    if config is None:
        raise SharefoldError("the model is not a sharefold network: convert it first (sharefold.convert_)")
    return config


def carried_config(model: nn.Module) -> FileConfig | None:
    """As :func:`config_of`; None for a network that nothing converted."""
    config = getattr(model, _ATTRIBUTE, None)
    return config if isinstance(config, FileConfig) else None


def carry_config(model: nn.Module, config: FileConfig | None) -> None:
    """Leaves ``config`` on the model, or takes it off."""
    if config is not None:
        setattr(model, _ATTRIBUTE, config)
    elif hasattr(model, _ATTRIBUTE):
        delattr(model, _ATTRIBUTE)


def check_dense(model: nn.Module) -> None:
    """Checks that no plan was carried out on ``model``: a file holds one plan, and loading starts from the dense network.

    Raises:
        SharefoldError: it is converted.
    """
    config = carried_config(model)
    if config is not None and config.plan.groups:
        raise SharefoldError("this network is converted already: plan and convert its original (Conversion.original, or "
                             "sharefold.expand), with one plan for all its layers")  # fmt: skip


def without_figures(config: FileConfig) -> FileConfig:
    """``config`` without what was measured of the network's answers, which training changes."""
    return replace(config, metrics={key: value for key, value in config.metrics.items() if key not in FIGURES}, steps=())


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, contiguous, and alias -> name for tensors that the network itself ties."""
    aliases = aliases_of(state)
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in aliases:
            kept = tensor.detach().cpu().contiguous()
            # A view into a larger storage would drag the whole storage into the file.
            whole = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
            tensors[name] = kept if whole else kept.clone()
    return tensors, aliases


def aliases_of(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> earlier name of the same tensor."""
    aliases: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
        else:
            owners[key] = name
    return aliases


def read_config_file(file: Path) -> FileConfig:
    """The configuration in ``sharefold_config.json``.

    Raises:
        SharefoldError: as :meth:`FileConfig.from_text`, or it cannot be read.
    """
    return FileConfig.from_text(read_text(file, f"{file.parent}: its configuration"), file.parent)


def checked_pretrained_cfg(data: Any, where: str | Path) -> dict[str, Any]:
    """timm's ``pretrained_cfg`` with lists as tuples; keys that are not checked here are kept as they are.

    Raises:
        SharefoldError: no object, an input size that is none, or means and deviations that fit no image of it.
    """
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise _wrong(where, "pretrained_cfg", "an object", data)
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    size = found.get("input_size")
    if size is not None and not (
        isinstance(size, tuple) and all(is_int(v) for v in size) and is_size(size)
    ):
        raise _wrong(where, "input_size", f"three whole numbers C, H, W {SIZES}", data["input_size"])
    for key in ("mean", "std"):
        values = found.get(key)
        if values is None:
            continue
        if not isinstance(values, tuple) or not values or not all(is_number(v) and abs(v) <= _FLOAT32.max for v in values):
            raise _wrong(where, key, "a list of finite numbers", data[key])
        # A colour recipe on a grey network is what timm has: its stem is summed over the inputs.
        if size is not None and len(values) not in {1, size[0], 3 if size[0] == 1 else size[0]}:
            raise _wrong(where, key, f"{size[0]} numbers, as input_size has channels", data[key])
        if key == "std" and min(values) < _FLOAT32.tiny:
            raise _wrong(where, key, "above 0", data[key])
    for key, least, most in (("crop_pct", LEAST_CROP, MOST_CROP), ("num_classes", -1, 1 << 31)):
        number: Any = found.get(key)
        if number is not None and not (is_number(number) and least <= number <= most):
            raise _wrong(where, key, f"a number from {least} to {most}", number)
    for key, words in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
        if found.get(key) is not None and found[key] not in words:
            raise _wrong(where, key, f"one of {', '.join(words)}", found[key])
    return found


def _packed(config: FileConfig) -> str:
    text = json.dumps(config.to_dict(), separators=(",", ":"), sort_keys=True)
    return PACKED + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _types_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """:attr:`FileConfig.dtypes` of ``tensors``: the most frequent type, and the names that have another."""
    kinds = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t.is_floating_point()}
    if set(kinds.values()) <= {"float32"}:
        return {}
    common = Counter(kinds.values()).most_common(1)[0][0]
    return {"": common, **{name: kind for name, kind in kinds.items() if kind != common}}


def _base(data: Any, where: str | Path) -> dict[str, Any] | None:
    if not data:
        return None
    if not isinstance(data, dict) or not isinstance(data.get("kwargs", {}), dict):
        raise _wrong(where, "base", "an object with library, name and kwargs", data)
    for key in ("library", "name"):
        if not isinstance(data.get(key), str):
            raise _wrong(where, f"{key} of base", "a text", data.get(key))
    return {"library": data["library"], "name": data["name"], "kwargs": data.get("kwargs", {})}


def _aliases(data: Any, where: str | Path) -> dict[str, str]:
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data.values()):
        raise _wrong(where, "aliases", "an object of texts", data)
    return data


def _store(data: Any, where: str | Path) -> tuple[int | None, dict[str, str]]:
    if not data:
        return None, {}
    if not isinstance(data, dict) or not is_int(data.get("format")) or data["format"] < 1:
        raise _wrong(where, "store", "an object with a format number", data)
    kinds = data.get("dtypes") or {}
    if not isinstance(kinds, dict) or not all(isinstance(kind, str) and kind in _DTYPES for kind in kinds.values()):
        raise _wrong(where, "dtypes of store", f"names of types ({', '.join(_DTYPES)})", kinds)
    return data["format"], kinds


def _wrong(where: str | Path, what: str, wanted: str, found: Any) -> SharefoldError:
    return SharefoldError(f"{where}: {what} in its configuration must be {wanted}, not {shown(found)}")


def _unpacked(text: str, where: str | Path) -> str:
    if not text.startswith(PACKED):
        return text
    try:
        if len(text) > 2 * JSON_LIMIT:
            raise ValueError("too long")
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b85decode(text[len(PACKED) :].rstrip(" ")), JSON_LIMIT)
        if not unzip.eof:
            raise ValueError("cut off, or larger than any configuration")
        return data.decode()
    except (ValueError, zlib.error, binascii.Error):
        raise SharefoldError(f"{where}: its configuration is damaged: download or save it again") from None
