"""``open_source``: one text in, one network out."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sharefold import checkpoint
from sharefold.architectures import segmentation
from sharefold.architectures.arguments import close_matches, parse_options
from sharefold.architectures.bases import base_of
from sharefold.architectures.bounded import check_buffers, limited_modules
from sharefold.architectures.build import (
    LIBRARIES,
    build_base,
    build_on_meta,
    check_arguments,
    check_name,
    make_base,
    note_base,
    registry,
)
from sharefold.architectures.matching import Match, exact_match, fits, match_architecture, named_architecture
from sharefold.architectures.shapes import check_fit, load_weights, shapes_of
from sharefold.errors import SharefoldError, SharefoldWarning
from sharefold.files import check_path
from sharefold.format import checked_pretrained_cfg, config_of
from sharefold.hub import shared_folder
from sharefold.options import OpenOptions, chosen
from sharefold.ownership import WEIGHTS_NAME
from sharefold.sources.hub_models import open_hub, open_smp, open_timm, open_torchvision, open_yolo
from sharefold.sources.own import fitting_part, is_own, own_network
from sharefold.sources.preprocessing import preprocessing
from sharefold.sources.read import check_file, read_state_dict
from sharefold.sources.twins import Look, settled
from sharefold.sources.unwrap import PREFIXES, under
from sharefold.untrusted import expanded, parse_json, read_text, shown

_KINDS = {
    "timm": "timm", "tv": "torchvision", "torchvision": "torchvision", "smp": "smp", "yolo": "ultralytics",
    "ultralytics": "ultralytics", "hf-hub": "hf-hub", "hf_hub": "hf-hub",
}  # fmt: skip
_PREFIXED = re.compile(r"([A-Za-z][\w-]+):(.*)", re.DOTALL)
_HUB_FILES = (WEIGHTS_NAME, "pytorch_model.bin")  # what timm's push_to_hf_hub and save_for_hf write
_HUB_CONFIG = "config.json"
_LARGEST_NETWORK = 4096  # tensors of what is only looked at


@dataclass
class Source:
    """An opened network.

    Attributes:
        model: in eval mode, on the CPU.
        base: recipe of the stock architecture for :func:`build_base`; ``{}`` for a network of the user's own that no
            library can build again.
        pretrained_cfg: ``input_size`` (C, H, W), ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``num_classes``,
            and ``crop_mode`` where it is not the centre.
        name: of the architecture.
        kind: ``timm`` | ``torchvision`` | ``smp`` | ``ultralytics`` | ``hf-hub`` | ``sharefold`` | ``checkpoint`` | ``pickle`` |
            ``own``, a checkpoint whose architecture is ``FILE.py:FACTORY``.
        shared: whether it is a converted network, from a file or the Hub.
        meta: for checkpoints, what was unwrapped and dropped, extras such as the stored accuracy, other architectures
            with the same tensors (``others``) and why this one was chosen (``rule``), absent buffers (``absent``).
    """

    model: nn.Module
    base: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    name: str
    kind: str
    shared: bool = False
    meta: dict[str, Any] = field(default_factory=dict)


def open_source(
    source: str | Path, options: OpenOptions | None = None, *, look: Look | None = None, **settings: Any
) -> Source:
    """Opens a network.

    Args:
        source: ``timm:NAME``, ``tv:NAME``, ``smp:NAME``, ``yolo:NAME`` (``:key=value,...`` behind it is for the builder),
            ``yolo:FILE.pt`` (a pickle of ultralytics),
            ``hf-hub:OWNER/NAME[@REVISION]`` (a repository of timm, or one that :func:`sharefold.hub.push_to_hub` wrote), a
            sharefold directory or file, a checkpoint file, or a folder that timm's or smp's ``save_pretrained`` wrote.
        options: what is known beside; ``settings`` are single fields of it (``arch="timm:resnet50"``).
        look: gives normalised images (n, C, H, W), no labels, for a configuration such as ``pretrained_cfg``. Where several
            architectures have the tensors of a file, they tell by its BatchNorms which one it was trained with; by default
            procedural images have to.

    Raises:
        SharefoldError: in one line, whatever is wrong with the request, the file or the network connection.

    Warns:
        SharefoldWarning: several architectures fit a file, and its BatchNorms do not tell which one it is.
    """
    options = chosen(options, settings, OpenOptions)
    if options.num_classes is not None and options.num_classes < 1:
        raise SharefoldError(f"num_classes={options.num_classes}: a classifier needs at least one class")
    if options.in_chans is not None and options.in_chans < 1:
        raise SharefoldError(f"in_chans={options.in_chans}: an input needs at least one channel")
    text = str(source)
    kind, rest = _split(text)
    if kind is None:
        return _open_path(expanded(text), options, look)
    if options.arch is not None:
        raise SharefoldError(f"--arch is for checkpoint files, and {text} names its architecture: leave --arch out")
    if kind in ("smp", "ultralytics") and rest and rest.partition(":")[0] not in registry(kind):
        if expanded(rest).exists() or rest.endswith(".pt"):
            return _open_path(expanded(rest), options, look)
        if ".pt:" in rest:
            raise SharefoldError(f"{text}: a file knows its architecture: leave out what stands behind .pt")
    name, kwargs = _name_and_options(rest, text) if kind != "hf-hub" else (rest, {})
    for key, value in (("num_classes", options.num_classes), ("in_chans", options.in_chans)):
        if value is not None:
            kwargs[key] = value
    opener = {
        "timm": open_timm, "torchvision": open_torchvision, "smp": open_smp, "ultralytics": open_yolo, "hf-hub": open_hub,
    }[kind]  # fmt: skip
    if not name:
        raise SharefoldError(f"no model name in {text!r}: write for example timm:resnet50")
    if kind == "hf-hub":
        folder = shared_folder(name)
        if folder is not None:
            _refuse_options(text, replace(options, arch=None))
            return replace(_open_sharefold(folder), kind=kind)
    model, base = opener(name, kwargs, options.pretrained)
    return Source(note_base(model, base), base, preprocessing(model, base), base["name"], kind)


def open_shapes(source: str) -> Source:
    """As :func:`open_source` for ``timm:NAME`` and ``tv:NAME``, without memory for tensors: what a stranger names costs nothing.

    Raises:
        SharefoldError: another kind of source, or as :func:`open_source`.
    """
    kind, rest = _split(source)
    if kind not in LIBRARIES:
        raise SharefoldError(f"{shown(source)} is no network of {', '.join(LIBRARIES)}")
    name, kwargs = _name_and_options(rest, shown(source))
    check_name(kind, name)
    base = make_base(kind, name, kwargs)
    with limited_modules(_LARGEST_NETWORK, shown(source)):
        model = build_on_meta(base)
    return Source(model, base, preprocessing(model, base), base["name"], kind)


def _split(text: str) -> tuple[str | None, str]:
    """(kind, rest) of a prefixed name; (None, text) of a path."""
    found = _PREFIXED.fullmatch(text)
    if found is None:
        return None, text
    prefix = found.group(1).lower()
    if prefix in _KINDS:
        return _KINDS[prefix], found.group(2)
    check_path(Path(text))
    if Path(text).exists():
        return None, text
    raise SharefoldError(
        f"unknown source {text!r}: known prefixes are timm:, tv:, smp:, yolo: and hf-hub:, anything else is a path"
    )


def _name_and_options(rest: str, where: str) -> tuple[str, dict[str, Any]]:
    name, _, options = rest.partition(":")
    kwargs = parse_options(options, where)
    check_arguments(name, kwargs)
    return name.strip(), kwargs


def _open_path(path: Path, options: OpenOptions, look: Look | None) -> Source:
    arch = options.arch
    check_path(path)
    if checkpoint.is_sharefold(path):
        builder = arch if is_own(arch) and checkpoint.read_config(path).base is None else None
        _refuse_options(path, replace(options, arch=None) if builder else options)
        return _open_sharefold(path, builder)
    hub: dict[str, Any] = {}
    if path.is_dir():
        path, hub = _hub_layout(path)
    elif not path.exists():
        _refuse_missing(path)
    state, notes = read_state_dict(path, options.trust_pickle)
    module = notes.pop("module", None)
    if arch is not None and is_own(arch):
        return _open_own(arch, state, notes, path, options)
    own = module is not None and type(module).__module__.partition(".")[0] not in ("timm", "torchvision", "sharefold")
    if own and arch is None:
        return _open_module(module, path, notes)
    try:
        state, match = _architecture(state, notes, path, arch, hub)
    except SharefoldError:
        if module is None or arch is not None:
            raise
        return _open_module(module, path, notes)
    match = settled(match, state, str(path), look)
    return _fill(state, match, notes, path, options, hub)


def _fill(
    state: dict[str, Tensor], match: Match, notes: dict[str, Any], path: Path, options: OpenOptions, hub: dict[str, Any]
) -> Source:
    base, fresh, num_classes = match.base, frozenset[str](), options.num_classes
    kwargs = base["kwargs"]
    if num_classes is not None and num_classes != kwargs.get("num_classes"):
        warnings.warn(
            f"{path} has {kwargs.get('num_classes', 'other')} classes, not {num_classes}: "
            "the classifier starts from random weights",
            SharefoldWarning,
            stacklevel=4,
        )
        base = {**base, "kwargs": {**kwargs, "num_classes": num_classes}}
        fresh = match.head
    with limited_modules(len(state), str(path)):  # nothing is allocated before it is known to be what the file holds
        blank = build_on_meta(base)
        check_fit(blank, shapes_of(state), str(path), base["name"], fresh)
        check_buffers(blank, sum(tensor.nbytes for tensor in state.values()), str(path))
    model = _typed(build_base(base), state, path)
    config = preprocessing(model, base, path)
    config.update(hub.get("pretrained_cfg", {}))
    channels = config["input_size"][0]
    if options.in_chans not in (None, channels):
        raise SharefoldError(f"{path} takes {channels} input channels, not {options.in_chans}: leave the channel count out")
    notes["absent"] = load_weights(model, state, str(path), base["name"], skip=fresh)
    notes.update(others=list(match.others), rule=match.rule)
    config["num_classes"] = base["kwargs"].get("num_classes", config["num_classes"])
    return Source(model.eval(), base, config, base["name"], "checkpoint", meta=notes)


def _typed(model: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    """``model`` in float64 where all floating tensors of the file are; halves are opened in float32, which holds each value."""
    kinds = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if kinds == {torch.float64}:
        return model.double()
    lost = [name for name, t in state.items() if t.dtype == torch.float64 and not torch.equal(t.float().double(), t)]
    if lost:
        warnings.warn(
            f"{path} holds float64 beside other types: opened in float32, which rounds {len(lost)} tensors, first {lost[0]}",
            SharefoldWarning,
            stacklevel=5,
        )
    elif kinds and kinds <= {torch.float16, torch.bfloat16}:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        warnings.warn(
            f"{path} holds {names}: opened in float32, of the same values; store fp16 writes files of halves",
            SharefoldWarning,
            stacklevel=5,
        )
    return model


def _architecture(
    state: dict[str, Tensor], notes: dict[str, Any], path: Path, arch: str | None, hub: dict[str, Any]
) -> tuple[dict[str, Tensor], Match]:
    """The architecture, and the part of ``state`` that belongs to it."""
    shapes = shapes_of(state)
    if arch is None and hub:
        check_name(hub["library"], hub["architecture"])
        return state, named_architecture(hub["library"], hub["architecture"], hub["model_args"], shapes)
    if arch is not None:
        return _named(state, notes, arch)
    hints = notes["extras"]
    match = exact_match(shapes, str(path), hints)
    if match is not None:
        return state, match
    # Training frameworks store losses and metrics beside the network, whose own names then share a prefix.
    for prefix in PREFIXES:
        part = under(state, prefix)
        match = exact_match(shapes_of(part), str(path), hints) if part else None
        if match is not None:
            return _taken(part, prefix, state, notes), match
    return state, match_architecture(shapes, str(path), hints)


def _named(state: dict[str, Tensor], notes: dict[str, Any], arch: str) -> tuple[dict[str, Tensor], Match]:
    """As :func:`_architecture`, of the architecture that the user names; all of ``state`` where no part of it fits."""
    library, name, kwargs = _parse_arch(arch)
    whole = named_architecture(library, name, kwargs, shapes_of(state))
    if fits(shapes_of(state), whole.base):
        return state, whole
    for prefix in PREFIXES:
        part = under(state, prefix)
        if not part:
            continue
        with suppress(SharefoldError):  # far too few tensors for this network
            match = named_architecture(library, name, kwargs, shapes_of(part))
            if fits(shapes_of(part), match.base):
                return _taken(part, prefix, state, notes), match
    return state, whole


def _taken(part: dict[str, Tensor], prefix: str, state: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Tensor]:
    """``part`` of ``state``, with notes on what it was under and what is left."""
    notes["unwrapped"].append(prefix)
    notes["dropped"] += [key for key in state if not key.startswith(prefix)]
    return part


def _parse_arch(arch: str) -> tuple[str, str, dict[str, Any]]:
    kind, rest = _split(arch) if ":" in arch and arch.partition(":")[0].lower() in _KINDS else (None, arch)
    if kind == "hf-hub":
        raise SharefoldError(f"--arch {arch}: name an architecture of timm, torchvision, smp or ultralytics")
    name, kwargs = _name_and_options(rest, f"--arch {arch}")
    if kind is None:
        plain = name.partition(".")[0]
        kind = "torchvision" if plain not in registry("timm") and plain in registry("torchvision") else "timm"
    check_name(kind, name)
    return kind, name, segmentation.known_arguments(kwargs) if kind == "smp" else kwargs


def _refuse_options(source: str | Path, options: OpenOptions) -> None:
    for name in ("arch", "num_classes", "in_chans"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise SharefoldError(f"{source} is a converted network and knows its architecture: leave {option} out")


def _open_sharefold(path: Path, own: str | None = None) -> Source:
    model = checkpoint.load(path, model=None if own is None else own_network(own))
    config = config_of(model)
    base = config.base or {}
    cfg = {**preprocessing(model, base), **config.pretrained_cfg}
    return Source(model.eval(), base, cfg, base.get("name", path.stem), "sharefold", shared=True)


def _open_own(arch: str, state: dict[str, Tensor], notes: dict[str, Any], path: Path, options: OpenOptions) -> Source:
    for name in ("num_classes", "in_chans"):
        if getattr(options, name) is not None:
            raise SharefoldError(f"--{name.replace('_', '-')} has no effect with --arch {arch}: the file builds the network")
    model = own_network(arch)
    state = fitting_part(model, state)
    model = _typed(model, state, path)
    notes["absent"] = load_weights(model, state, str(path), arch)
    return Source(model, {}, preprocessing(model, {}, path), type(model).__name__, "own", meta=notes)


def _open_module(module: nn.Module, path: Path, notes: dict[str, Any]) -> Source:
    # Trainers of detectors keep halves; all is computed in float32, which holds each value.
    module = module.float().eval()
    base = base_of(module) or {}
    name = base.get("name", type(module).__name__)
    return Source(module, base, preprocessing(module, base, path), name, "pickle", meta=notes)


def _hub_layout(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Weights file and configuration of a folder in the layout that timm, or segmentation_models_pytorch, writes for the Hub.

    Raises:
        SharefoldError: it is none, or its configuration is damaged.
    """
    config_file = folder / _HUB_CONFIG
    file = next((folder / name for name in _HUB_FILES if (folder / name).is_file()), None)
    if file is None or not config_file.is_file():
        raise SharefoldError(
            f"{folder} is a directory without a model: it holds neither sharefold_config.json nor timm's or smp's config.json "
            "with weights: name the checkpoint file inside it"
        )
    check_file(config_file)
    config = parse_json(read_text(config_file, str(config_file)), str(config_file))
    if isinstance(config, dict) and isinstance(config.get("_model_class"), str):
        name = config.pop("_model_class").lower()
        arguments = segmentation.known_arguments(config)
        check_arguments(name, arguments)
        return file, {"library": "smp", "architecture": name, "model_args": arguments}
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise SharefoldError(
            f"{config_file} names neither timm's 'architecture' nor smp's '_model_class': name the file {file} and --arch instead"
        )
    arguments = config.get("model_args") or {}
    check_arguments(config["architecture"], arguments)
    given = config.get("pretrained_cfg")
    source = given if isinstance(given, dict) else config
    wanted = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    cfg = checked_pretrained_cfg({key: source[key] for key in wanted if source.get(key) is not None}, config_file)
    return file, {"library": "timm", "architecture": config["architecture"], "model_args": arguments, "pretrained_cfg": cfg}


def _refuse_missing(path: Path) -> None:
    """Says which prefix a bare model name lacks.

    Raises:
        SharefoldError: always.
    """
    name = str(path)
    plain = name.partition(".")[0]
    if path.parent == Path(".") and not path.suffix:
        if plain in registry("timm"):
            raise SharefoldError(f"{name} does not exist as a file: write timm:{name} for timm's model")
        if plain in registry("torchvision"):
            raise SharefoldError(f"{name} does not exist as a file: write tv:{name} for torchvision's model")
        hint = close_matches(name, registry("timm"))
        if hint:
            raise SharefoldError(f"{name} does not exist as a file, nor as a model: {hint} (timm:NAME)")
    check_file(path)
