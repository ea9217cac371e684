"""Saving and loading shared networks: safetensors plus one JSON text, never a pickle.

A directory holds ``model.safetensors``, ``sharefold_config.json`` and a ``README.md`` card; the same JSON is also in
the safetensors metadata, so the one file alone loads too.
"""

from __future__ import annotations

import base64
import json
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sharefold.card import model_card
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.files import check_output, write_file, write_folder
from sharefold.layers import shared_layers, stray_pointers, to_dense
from sharefold.methods import step_named
from sharefold.methods.checks import check_plan
from sharefold.plans import Plan
from sharefold.settings import plain_defaults
from sharefold.state_dicts import load_tensors
from sharefold.version import __version__

FORMAT_VERSION = 1
CONFIG_NAME, WEIGHTS_NAME, METADATA_KEY = "sharefold_config.json", "model.safetensors", "sharefold"
# Before a configuration that is compressed and in base 85; and the most bytes it may unfold to.
_PACKED, _CONFIG_LIMIT = "zlib85:", 1 << 26
_KNOWN = {"format_version", "sharefold_version", "base", "plan", "metrics", "pretrained_cfg", "aliases", "store"}


@plain_defaults()
def save(model: nn.Module, path: str | Path, *, metrics: dict[str, Any] | None = None, force: bool = False) -> Path:
    """Writes a converted model.

    Args:
        model: a network that ``convert_`` converted, or that ``load`` returned.
        path: a directory, or a file ending in ``.safetensors``.
        metrics: JSON values for the config and the card (accuracy, agreement, seconds ...).
        force: replace what is there.

    Returns:
        The path.

    Raises:
        SharefoldError: not converted, exists already, or cannot be written; nothing is half-written.
    """
    target = check_output(path, force)
    config = dict(config_of(model))
    if metrics is not None:
        config["metrics"] = {**config.get("metrics", {}), **metrics}
        model.sharefold_config = config  # type: ignore[assignment]
    tensors, aliases = distinct(model.state_dict())
    store = config.get("store")
    if store:
        from sharefold.store import StoreSpec

        if not StoreSpec.from_dict(store).fits(tensors):
            warnings.warn(
                "the weights changed since they were rounded: saved in full precision; run "
                "sharefold.store.quantize_ again for a small file",
                SharefoldWarning,
                stacklevel=2,
            )
            store = None
            model.sharefold_config = {key: value for key, value in config.items() if key != "store"}  # type: ignore[assignment]
    config = file_config(model, aliases)
    text = json.dumps(config, separators=(",", ":"))
    if store:
        from sharefold.store import encode

        tensors = encode(tensors, store)
        text = pack_config(config)
    metadata = {METADATA_KEY: text, "format": "pt"}
    if target.suffix == ".safetensors":
        write_file(target, lambda temporary: save_file(tensors, str(temporary), metadata))
        return target

    def fill(folder: Path) -> None:
        save_file(tensors, str(folder / WEIGHTS_NAME), metadata)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(config))

    write_folder(target, fill)
    return target


@plain_defaults()
def load(path: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Reads a shared network in one call; runs no code from the file.

    Args:
        path: a directory or ``.safetensors`` file that ``save`` wrote.
        model: the dense architecture, for networks that neither timm nor torchvision can build; it is converted in
            place.
        device: where the result goes.

    Returns:
        The network in eval mode.

    Raises:
        SharefoldError: missing, damaged, not of sharefold, of a newer format, or its architecture cannot be built.
    """
    file, config = read_config(path)
    if model is None:
        base = config.get("base")
        if not base:
            raise SharefoldError(
                f"{path} was made from a network of your own: pass its dense module as load(..., model=...)"
            )
        from sharefold.sources import build_base

        model = build_base(base)
    plan = Plan.from_dict(config["plan"], where=f"the plan in {path}")
    check_plan(model, plan)
    for group in plan.groups:
        step_named(group.method).install(model, group, None)
    state = _read_tensors(file)
    if config.get("store"):
        from sharefold.store import decode

        template = {name: t for name, t in model.state_dict().items() if name not in config.get("aliases", {})}
        state, config["store"] = decode(state, template)
    for alias, name in config.get("aliases", {}).items():
        if name not in state:
            raise SharefoldError(f"{path} is damaged: tensor {name!r} is missing")
        state[alias] = state[name]
    try:
        load_tensors(model, state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SharefoldError(f"{path} does not fit its own plan: {reason[:300]}") from None
    _tie(model, config.get("aliases", {}))
    stray = stray_pointers(model)
    if stray:
        raise SharefoldError(f"{path} is damaged: tensor {stray[0]!r} points to entries that are not there")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.sharefold_config = config  # type: ignore[assignment]
    cfg = config.get("pretrained_cfg")
    if cfg and not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = cfg  # type: ignore[assignment]
    return model.to(device).eval()


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Puts one parameter in the places of another name and its alias: loading made two of one tensor."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for alias, name in aliases.items():
        if alias in parameters and name in parameters:
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameters[name])


@plain_defaults()
def expand(model: nn.Module) -> nn.Module:
    """The stock architecture with an ordinary state dict that computes what the shared network does.

    Args:
        model: a converted network; not changed.

    Raises:
        SharefoldError: a method of the plan has no dense twin (grouped pointwise).
    """
    if not shared_layers(model) and not hasattr(model, "sharefold_config"):
        raise SharefoldError("expand: the model has no shared layers: it is dense already")
    dense = to_dense(model)
    for group in reversed(Plan.from_dict(config_of(model)["plan"]).groups):
        step_named(group.method).expand(dense, group)
    del dense.sharefold_config
    return dense.eval()


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration that ``convert_`` or ``load`` left on the model.

    Raises:
        SharefoldError: there is none.
    """
    config = getattr(model, "sharefold_config", None)
    if not isinstance(config, dict):
        raise SharefoldError("the model is not a sharefold network: convert it first (sharefold.convert_)")
    return config


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The weights file and the configuration behind ``path``, checked.

    Raises:
        SharefoldError: as :func:`load`.
    """
    target = Path(path)
    if not target.exists():
        raise SharefoldError(f"{target} does not exist: check the path")
    file = target / WEIGHTS_NAME if target.is_dir() else target
    if not file.exists():
        raise SharefoldError(f"{target} holds no {WEIGHTS_NAME}: it is not a sharefold directory")
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise SharefoldError(f"{file} is damaged or no safetensors file ({error}): download or save it again") from None
    side = target / CONFIG_NAME
    text = side.read_text() if target.is_dir() and side.exists() else metadata.get(METADATA_KEY)
    if text is not None and text.startswith(_PACKED):
        text = _unpacked(text, target)
    if text is None:
        raise SharefoldError(
            f"{file} holds no sharefold configuration: convert it first, or use it as a checkpoint source"
        )
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise SharefoldError(f"{target}: its configuration is not JSON ({error.msg}, line {error.lineno})") from None
    if not isinstance(config, dict) or not isinstance(config.get("plan"), dict):
        raise SharefoldError(f"{target}: its configuration holds no plan: it is not a sharefold file")
    version = config.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise SharefoldError(
            f"{target} has format_version {version}, this sharefold reads up to {FORMAT_VERSION}: upgrade sharefold"
        )
    unknown = sorted(config.keys() - _KNOWN)
    if unknown:
        warnings.warn(
            f"{target}: unknown keys {unknown} in its configuration are ignored", SharefoldWarning, stacklevel=3
        )
    return file, config


def file_config(model: nn.Module, aliases: dict[str, str]) -> dict[str, Any]:
    """The configuration as the file holds it; how each tensor is stored stands beside the values instead."""
    config = {
        **config_of(model),
        "format_version": FORMAT_VERSION,
        "sharefold_version": __version__,
        "aliases": aliases,
    }
    if config.get("store"):
        config["store"] = {"format": config["store"]["format"]}
    return config


def pack_config(config: dict[str, Any]) -> str:
    """The configuration in few characters: a plan as plain JSON would be a tenth of a small network's file.

    Always the same ones, and without ``metrics``: they come after the size of the file was settled, and must not change it.
    """
    kept = {key: value for key, value in config.items() if key != "metrics"}
    text = json.dumps(kept, separators=(",", ":"), sort_keys=True)
    return _PACKED + base64.b85encode(zlib.compress(text.encode(), 9)).decode()


def _unpacked(text: str, target: Path) -> str:
    try:
        data = base64.b85decode(text[len(_PACKED) :])
        return zlib.decompressobj().decompress(data, _CONFIG_LIMIT).decode()
    except (ValueError, zlib.error):
        raise SharefoldError(f"{target}: its configuration is damaged: download or save it again") from None


def is_sharefold(path: str | Path) -> bool:
    """Whether ``path`` is a directory or file that sharefold wrote."""
    target = Path(path)
    if target.is_dir():
        return (target / CONFIG_NAME).exists()
    if target.suffix != ".safetensors" or not target.is_file():
        return False
    try:
        with safe_open(str(target), framework="pt") as handle:
            return METADATA_KEY in (handle.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), framework="pt") as handle:
            # A copy each: in the file tensors lie at odd addresses, for which some kernels round differently.
            return {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SharefoldError(f"{file} is damaged ({error}): download or save it again") from None


def distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, contiguous, and alias -> name for tensors that the network itself ties."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in owners:
            aliases[name] = owners[key]
            continue
        owners[key] = name
        kept = tensor.detach().cpu().contiguous()
        # A view into a larger storage would drag the whole storage into the file.
        whole = kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
        tensors[name] = kept if whole else kept.clone()
    return tensors, aliases
