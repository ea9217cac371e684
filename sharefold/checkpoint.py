"""Saving and loading shared networks: safetensors plus one JSON text, never a pickle.

A directory holds ``model.safetensors``, ``sharefold_config.json`` and a ``README.md`` card; the same JSON is also in
the safetensors metadata, so the one file alone loads too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sharefold.architectures.bounded import check_buffers
from sharefold.blank import blank_network, check_inflation, check_shapes, install, real_network, shape_of_network
from sharefold.card import model_card
from sharefold.checksum import check_finite, check_types, checksum
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.files import check_output, check_path, write_file, write_folder
from sharefold.format import (
    CARD_NAME,
    CHECKSUM_KEY,
    CONFIG_NAME,
    METADATA_KEY,
    WEIGHTS_NAME,
    FileConfig,
    carried_config,
    carry_config,
    config_of,
    distinct,
    read_config_file,
)
from sharefold.graph.preserved import restored_on_error
from sharefold.layers import shared_layers, stray_pointers, to_dense
from sharefold.methods import step_named
from sharefold.metrics import check_metrics, kind_of
from sharefold.ownership import network_files
from sharefold.running import usable_device
from sharefold.safetensors_file import write_tensors
from sharefold.settings import plain_defaults
from sharefold.state_dicts import check_fits_file, file_tensors, load_tensors, tensor_state
from sharefold.store import container, decode
from sharefold.store.blob import NAME as BLOB
from sharefold.store.file_content import file_content
from sharefold.store.held_codes import check_holds_none, hold_codes_
from sharefold.store.plain_size import dense_bytes
from sharefold.store.short_config import config_from
from sharefold.store.tensor_spec import FORMAT, carried_spec, carry_spec

R = TypeVar("R")
_ATTEMPTS = 20


@plain_defaults()
def save(
    model: nn.Module, path: str | Path, *, metrics: dict[str, Any] | None = None, force: bool = False, plain: bool = False
) -> Path:  # fmt: skip
    """Writes a converted model.

    A weights file that would be larger than the original network's is packed into one tensor, bit for bit.

    Args:
        model: a network that ``convert_`` converted, or that ``load`` returned.
        path: a directory, or a file ending in ``.safetensors``.
        metrics: JSON values for the config and the card (accuracy, agreement, seconds ...).
        force: replace what is there.
        plain: keep every tensor under its name for other readers, at any size.

    Returns:
        The path.

    Raises:
        SharefoldError: not converted, exists already, cannot be written, or weights that are no tensors (torch's quantised
            layers); nothing is half-written.

    Warns:
        SharefoldWarning: the weights changed since they were rounded, the file is larger than the original's all the same, or
            what ``get_extra_state`` returns is no tensor and left out: ``load`` leaves that of ``model`` as it is.
    """
    target = check_saves(model, path, metrics, force)
    tensors, aliases = distinct(file_tensors(model, str(target)))
    spec = carried_spec(model)
    if spec is not None and not spec.fits(tensors):
        warnings.warn(
            "the weights changed since they were rounded: saved in full precision; for a small file round them again "
            "(sharefold round, sharefold.round_)",
            SharefoldWarning,
            stacklevel=2,
        )
        spec = None
        carry_spec(model, None)
    config = config_of(model)
    if metrics is not None:
        config = replace(config, metrics={**config.metrics, **metrics})
        carry_config(model, config)
    config = config.of(tensors, aliases, None if spec is None else FORMAT)
    check_finite(tensors, str(target), "a run that diverged? take an earlier state")
    FileConfig.from_text(config.to_text(), target)  # what could not be read again is not written
    if spec is None:
        check_types(tensors, str(target))
    declared = sum(tensor.nbytes for tensor in tensors.values())
    alone = target.suffix == ".safetensors"
    content = file_content(config, tensors, spec, alone, plain)
    if config.base is not None:
        check_inflation(declared, sum(tensor.nbytes for tensor in content.tensors.values()), str(target))
        check_buffers(model, declared, str(target))
    if alone:
        write_file(target, lambda temporary: write_tensors(temporary, content.tensors, content.metadata))
    else:
        beside = replace(content.config, metrics=config.metrics, steps=config.steps)

        def fill(folder: Path) -> None:
            write_tensors(folder / WEIGHTS_NAME, content.tensors, content.metadata)
            (folder / CONFIG_NAME).write_text(json.dumps(beside.to_dict(), indent=2) + "\n")
            (folder / CARD_NAME).write_text(model_card(config))

        write_folder(target, fill)
    if not plain and content.size > content.limit > 0:
        warnings.warn(
            f"{target if alone else target / WEIGHTS_NAME} has {content.size:,} bytes, and the file of the original network "
            f"{content.limit:,}: so small a network is better left as it is, or stored in fewer bits (store int8)",
            SharefoldWarning,
            stacklevel=3,
        )
    return target


def check_saves(model: nn.Module, path: str | Path, metrics: Mapping[str, Any] | None = None, force: bool = False) -> Path:
    """Refuses before any work what :func:`save` would refuse after it, by the place, the network and the figures.

    Returns:
        The path.

    Raises:
        SharefoldError: as :func:`save`.
    """
    target = check_output(path, force, network_files(Path(path)))
    check_holds_none(model, "save")
    check_fits_file(model, str(target))
    config = config_of(model)
    if metrics is not None:
        check_metrics(metrics)
        FileConfig.from_text(replace(config, metrics={**config.metrics, **metrics}).to_text(), target)
    if carried_spec(model) is None:
        check_types(tensor_state(model), str(target))
    return target


@plain_defaults()
def load(
    path: str | Path, *, model: nn.Module | None = None, device: str | torch.device = "cpu", keep_codes: bool = False
) -> nn.Module:  # fmt: skip
    """Reads a shared network in one call; runs no code from the file.

    Args:
        path: a directory or ``.safetensors`` file that ``save`` wrote.
        model: the dense architecture, for networks that neither timm nor torchvision can build; it is converted in
            place.
        device: where the result goes.
        keep_codes: of a network that was rounded, hold the small codes in memory and make numbers of them at every run, which
            takes longer; for inference alone.

    Returns:
        The network in eval mode.

    Raises:
        SharefoldError: missing, damaged, not of sharefold, of a newer format, its architecture cannot be built, it was not
            rounded and codes are to be kept, or there is no such device here. After this or any other exception ``model`` is
            what it was.
    """
    device = usable_device(device)
    config, state = _settled(Path(path), _read)
    if model is None and config.base is None:
        raise SharefoldError(
            f"{path} was made from a network of your own: pass its dense module as load(..., model=...), or say what builds it: "
            "--arch FILE.py:FACTORY"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise SharefoldError(f"load: model must be a network, a torch.nn.Module, not {kind_of(model)}")
    with nullcontext() if model is None else restored_on_error(model):
        return _filled(path, config, state, model, device, keep_codes)


def _filled(
    path: str | Path, config: FileConfig, state: dict[str, Tensor], model: nn.Module | None, device: str | torch.device,
    keep_codes: bool,
) -> nn.Module:  # fmt: skip
    """``model``, or by default a new network, as the file at ``path`` says, with its tensors; as :func:`load`."""
    spec = None
    if model is not None:
        original = {name: tensor.to("meta") for name, tensor in tensor_state(model).items()}
        install(model, config.plan)
        shape = model
    else:
        shape, original = shape_of_network(config, state, str(path))
    template = tensor_state(shape)
    if config.store is not None:
        state, spec = decode(state, config.typed(template))
    whose = "its own plan" if model is None else "the network that was given (is it of the same class and size?)"
    check_shapes(template, state, config.aliases, str(path), whose)
    check_finite(state, str(path), "it is damaged: download or save it again")
    floats = min((t.dtype for t in state.values() if t.is_floating_point()), key=lambda kind: kind.itemsize, default=None)
    original = {name: like for name, like in original.items() if name not in config.aliases}
    config = replace(config, dense_bytes=dense_bytes(original, floats))
    state |= {alias: state[name] for alias, name in config.aliases.items()}
    if model is None:
        model = blank_network(config, shape)
    try:
        load_tensors(model, state, assign=True)
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            model = real_network(config)
            load_tensors(model, state, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SharefoldError(f"{path} does not fit its own plan: {reason[:300]}") from None
    _tie(model, config.aliases)
    stray = stray_pointers(model)
    if stray:
        raise SharefoldError(f"{path} is damaged: tensor {stray[0]!r} points to entries that are not there")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    carry_config(model, config)
    carry_spec(model, spec)
    if config.pretrained_cfg and not hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg = config.pretrained_cfg  # type: ignore[assignment]
    model = model.to(device).eval()
    if keep_codes and (spec is None or not hold_codes_(model, spec)):
        raise SharefoldError(f"{path}: keep_codes: none of its matrices is rounded: convert with --store int8, or load without")
    return model


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
    check_holds_none(model, "expand")
    if not shared_layers(model) and carried_config(model) is None:
        raise SharefoldError("expand: the model has no shared layers: it is dense already")
    dense = to_dense(model)
    plan = config_of(model).plan
    for group in (*reversed(plan.sharing), *reversed(plan.narrowing)):
        step_named(group.method).expand(dense, group)
    carry_config(dense, None)
    carry_spec(dense, None)
    return dense.eval()


def read_config(path: str | Path) -> FileConfig:
    """The configuration of a directory or file, checked; its tensors are not looked at.

    Raises:
        SharefoldError: as :func:`load`.
    """
    return _settled(Path(path), lambda target: _read(target, tensors=False)[0])


def _read(target: Path, tensors: bool = True) -> tuple[FileConfig, dict[str, Tensor]]:
    """Configuration and tensors behind ``target``, which hold together."""
    if not target.exists():
        raise SharefoldError(f"{target} does not exist: check the path to the converted network")
    file = target / WEIGHTS_NAME if target.is_dir() else target
    if not file.exists():
        raise SharefoldError(f"{target} holds no {WEIGHTS_NAME}: it is not a sharefold directory")
    state: dict[str, Tensor] = {}
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata, packed = handle.metadata() or {}, _is_packed(handle)
            if packed or (tensors and METADATA_KEY in metadata):
                # A copy each: in the file tensors lie at odd addresses, for which some kernels round differently.
                state = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SharefoldError(f"{file} is damaged or no safetensors file ({error}): download or save it again") from None
    if packed:
        data, weights = container.unpacked(state[container.NAME], str(file))
        config, state = config_from(data, target), {BLOB: weights}
        if config.store is None:
            raise SharefoldError(f"{file} is damaged: it does not say how its tensors are packed: download or save it again")
    elif METADATA_KEY not in metadata:
        raise SharefoldError(f"{file} holds no sharefold configuration: convert it first, or use it as a checkpoint source")
    else:
        config = FileConfig.from_text(metadata[METADATA_KEY], target)
        if tensors:
            _check_sum(file, config, metadata, state)
    side = target / CONFIG_NAME
    if not target.is_dir() or not side.exists():
        return config, state
    # The copy beside the weights is for people and the Hub. It may know more metrics, and of packed weights the steps; all else
    # is said by the weights file, whose checksum covers it.
    copy = read_config_file(side)
    said = (c.to_dict().items() for c in (config, copy))
    more = {"metrics"} if config.steps else {"metrics", "steps"}
    inside, beside = ({k: json.dumps(v, sort_keys=True) for k, v in items if k not in more} for items in said)
    wrong = sorted(k for k in inside.keys() | beside.keys() if inside.get(k) != beside.get(k))
    if wrong:
        raise SharefoldError(
            f"{side} says another {wrong[0]} than {WEIGHTS_NAME}: it is damaged or was edited: delete it ({WEIGHTS_NAME} has a "
            "copy), or save again"
        )
    return replace(config, metrics={**config.metrics, **copy.metrics}, steps=config.steps or copy.steps), state


def _check_sum(file: Path, config: FileConfig, metadata: dict[str, str], state: dict[str, Tensor]) -> None:
    if not config.checksum and CHECKSUM_KEY not in metadata:
        warnings.warn(
            f"{file} has no checksum (an older sharefold wrote it), so that damage would not show: save it again",
            SharefoldWarning, stacklevel=5,
        )  # fmt: skip
    elif checksum(metadata[METADATA_KEY], state) != metadata.get(CHECKSUM_KEY):
        raise SharefoldError(f"{file} is damaged: its checksum does not hold: download or save it again")


def _settled(path: Path, read: Callable[[Path], R]) -> R:
    """``read(path)``, again while another process replaces what is there: its parts may come from two networks then."""
    check_path(path)
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        try:
            found = read(path)
        except SharefoldError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return found
    return read(path)


def _identity(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns


def is_sharefold(path: str | Path) -> bool:
    """Whether ``path`` is a directory or file that sharefold wrote."""
    target = Path(path)
    try:
        if target.is_dir():
            return (target / CONFIG_NAME).exists() or is_sharefold(target / WEIGHTS_NAME)
        if target.suffix != ".safetensors" or not target.is_file():
            return False
        with safe_open(str(target), framework="pt") as handle:
            return METADATA_KEY in (handle.metadata() or {}) or _is_packed(handle)
    except (SafetensorError, OSError):
        return False


def _is_packed(handle: Any) -> bool:
    """Whether the file behind ``handle`` is one tensor that holds all of it."""
    return list(handle.keys()) == [container.NAME] and METADATA_KEY not in (handle.metadata() or {})
