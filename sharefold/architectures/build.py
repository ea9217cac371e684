"""Stock architectures by name, from timm's registry (sharefold's own networks included), torchvision's, smp's and ultralytics'.

A *base* is the JSON recipe of an architecture: ``{"library": ..., "name": ..., "kwargs": {...}}`` with one of :data:`LIBRARIES`.
It may come from a file, so names are only ever looked up in these registries and arguments are plain literals.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sharefold import models as models  # registers sharefold's own networks with timm
from sharefold.architectures import segmentation, yolo
from sharefold.architectures.arguments import close_matches
from sharefold.errors import SharefoldError
from sharefold.untrusted import shown

# Builders make lists, layers and tables by their arguments before anybody can look; no architecture has larger ones.
_MOST_CLASSES, _LARGEST, _MOST_PARTS = 1 << 24, 1 << 17, 1000
_LONGEST, _LARGEST_SUM, _LONGEST_TEXT = 64, 20_000, 4096  # of a list, of its numbers' sizes, and of a text
_LARGEST_TABLE = 1 << 22  # numbers in a tensor with values, of builders that calculate with tensors
# Arguments that say how many of something there are: work grows by them, and often by their product with the next.
_COUNTS = re.compile(r"depth|heads|layers|blocks|multiplier|repeat|reps|stages|reuse|ratio|groups|window|kernel|patch|stride")
LIBRARIES = ("timm", "torchvision", "smp", "ultralytics")
SOURCE_PREFIXES = {"timm": "timm", "torchvision": "tv", "smp": "smp", "ultralytics": "yolo"}  # of sources on the command line
BASE_NOTE = "sharefold_base"  # attribute of a built model that holds its base; copies of the model have it too
# Arguments that would download or read something, or replace the configuration; `weights` is torchvision's name.
_BLOCKED = (
    "pretrained", "weights", "encoder_weights", "checkpoint", "cache_dir", "progress", "backbone", "features_only", "scriptable",
)  # fmt: skip
# torchvision's own pretrained weights for these two were trained with this input transform, which builders switch on.
_GOOGLE_NETS = ("googlenet", "inception_v3")


def build_base(base: dict[str, Any]) -> nn.Module:
    """The architecture that ``base`` names, with random weights, in eval mode; downloads and imports nothing.

    The base is noted on the model, where :func:`base_of` finds it.

    Raises:
        SharefoldError: unknown library or model, an argument that is no literal or that the model does not take.
    """
    library, name, kwargs = _checked(base)
    builder = {
        "timm": _timm_model, "torchvision": _torchvision_model, "smp": _smp_model, "ultralytics": yolo.build_network,
    }[library]  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return note_base(builder(name, kwargs).eval(), make_base(library, name, kwargs))
    except SharefoldError:
        raise
    except Exception as error:
        # Builders raise whatever their own arithmetic trips over when an argument does not suit them.
        text = " ".join(str(error).split())[:200]
        given = shown(", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "its defaults", 400)
        raise SharefoldError(
            f"{name} cannot be built with {given}: {type(error).__name__}: {text}: change these arguments"
        ) from None


def build_on_meta(base: dict[str, Any]) -> nn.Module:
    """As :func:`build_base`, without memory for the weights: enough for names and shapes."""
    try:
        with torch.device("meta"):
            return build_base(base)
    except SharefoldError as error:
        if not _needs_values(error.__context__):
            raise
        # Some builders calculate with tensors (torchvision's RegNet its widths), which need values.
        with _WeightsOnMeta():
            return build_base(base)


def _needs_values(error: BaseException | None) -> bool:
    """Whether a builder failed because tensors on the meta device have no values; all else fails with values, too."""
    return isinstance(error, (RuntimeError, NotImplementedError)) and "meta tensor" in str(error).lower()


class _WeightsOnMeta(TorchFunctionMode):
    """Only what holds weights goes to the meta device: tensors made empty or constant, as layers make theirs.

    Tables have values, so that they are small or the network is none that is built this way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        made = func(*args, **kwargs)
        if isinstance(made, torch.Tensor) and not made.is_meta and made.numel() > _LARGEST_TABLE:
            raise ValueError(f"a table of {made.numel():,} numbers")
        return made


def note_base(model: nn.Module, base: dict[str, Any]) -> nn.Module:
    """``model``, which from now on knows the base that it was built from."""
    setattr(model, BASE_NOTE, copy.deepcopy(base))
    return model


def make_base(library: str, name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"library": library, "name": name, "kwargs": dict(kwargs)}


def registry(library: str) -> list[str]:
    """Names that ``build_base`` accepts for a library, sorted."""
    if library == "timm":
        return sorted(_timm().list_models())
    if library == "torchvision":
        return sorted(_torchvision().list_models())
    return segmentation.names() if library == "smp" else yolo.names()


def own_models() -> list[str]:
    """Names of the networks that sharefold itself adds to timm's registry."""
    models = importlib.import_module("timm.models")
    names = _timm().list_models()
    return [name for name in names if models.model_entrypoint(name).__module__.startswith("sharefold.")]


def check_name(library: str, name: str) -> None:
    """Refuses names outside the registry, with close matches.

    Raises:
        SharefoldError: unknown library, model or (timm) tag.
    """
    if library not in LIBRARIES:
        raise SharefoldError(f"unknown model library {shown(library)}: known are {', '.join(LIBRARIES)}")
    if library == "smp":
        return segmentation.check_decoder(name)
    if library == "ultralytics":
        return yolo.check_network(name)
    prefix = SOURCE_PREFIXES[library]
    plain, _, tag = name.partition(".") if library == "timm" else (name, "", "")
    if not _is_registered(library, plain):
        hint = close_matches(plain, registry(library))
        if not hint:
            there = next((SOURCE_PREFIXES[other] for other in LIBRARIES if plain in registry(other)), None)
            hint = f"{there}:{plain} exists" if there else "check the name"
        raise SharefoldError(f"unknown model {prefix}:{shown(name)}: {hint}")
    if tag:
        check_tag(plain, tag)


def _is_registered(library: str, name: str) -> bool:
    """Whether ``name`` is in the :func:`registry`; timm sorts its 1,300 names for a list of all of them."""
    if library != "timm":
        return name in registry(library)
    return _timm().is_model(name) and name in _timm().list_models(name)  # no list has those that timm only still builds


def check_tag(name: str, tag: str) -> None:
    """Refuses a timm tag (``resnet50.TAG``) that does not exist.

    Raises:
        SharefoldError: with the nearest tags.
    """
    try:
        importlib.import_module("timm.models").get_pretrained_cfg(f"{name}.{tag}")
    except RuntimeError:
        tags = sorted(entry.partition(".")[2] for entry in _timm().list_pretrained(f"{name}.*"))
        hint = close_matches(tag, tags) or f"known are {', '.join(tags) or 'none'}"
        raise SharefoldError(f"unknown tag {tag!r} of timm:{name}: {hint}") from None


def _checked(base: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(base, dict) or not isinstance(base.get("name"), str) or not isinstance(base.get("library"), str):
        raise SharefoldError(f"bad base {shown(base)}: it needs the texts 'library' and 'name'")
    library, name, kwargs = base["library"], base["name"], base.get("kwargs") or {}
    if library == "timm":
        # A tag names weights, not the architecture; another timm version may not know it.
        plain, _, tag = name.partition(".")
        check_name(library, plain)
        try:
            check_name(library, name)
        except SharefoldError:
            name = plain if tag else name
    else:
        check_name(library, name)
    check_arguments(name, kwargs)
    return library, name, kwargs


def check_arguments(name: str, kwargs: Any) -> None:
    """Refuses arguments that are not literals, or that download, read files or import.

    Raises:
        SharefoldError: as above.
    """
    if not isinstance(kwargs, dict):
        raise SharefoldError(f"bad arguments for {shown(name)}: {shown(kwargs)}: they must be a table of key and value")
    for key, value in kwargs.items():
        if not isinstance(key, str) or key.startswith(_BLOCKED):
            raise SharefoldError(f"argument {shown(key)} of {name} is not allowed here: leave it out")
        if not _literal(value):
            raise SharefoldError(f"argument {key} of {name} is no plain value: {shown(value)}: give a number, text or list")
        most = _MOST_CLASSES if key == "num_classes" else _MOST_PARTS if _COUNTS.search(key) else _LARGEST
        if not _in_range(value, most):
            raise SharefoldError(f"argument {key} of {name} is out of range: {shown(value)}: no architecture is that large")


def _literal(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_literal(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _literal(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _in_range(value: Any, largest: int) -> bool:
    """Whether no number is larger than ``largest``, and no list long or of numbers that are large together."""
    parts = list(islice(_leaves(value), _LONGEST + 1))
    numbers = [abs(part) for part in parts if isinstance(part, (int, float))]
    if len(parts) > _LONGEST or any(len(part) > _LONGEST_TEXT for part in parts if isinstance(part, str)):
        return False
    return all(number <= largest for number in numbers) and (len(numbers) < 2 or sum(numbers) <= _LARGEST_SUM)


def _leaves(value: Any) -> Iterator[Any]:
    """What is in nested lists and tables; what is empty counts as one."""
    if not isinstance(value, (list, tuple, dict)):
        yield value
    elif not value:
        yield None
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)


def _timm() -> Any:
    return importlib.import_module("timm")


def _torchvision() -> Any:
    return importlib.import_module("torchvision.models")


def _timm_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    return _timm().create_model(name, pretrained=False, **kwargs)


def _torchvision_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    kwargs = dict(kwargs)
    in_chans = kwargs.pop("in_chans", 3)
    builder = torchvision_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        kwargs["weights_backbone"] = None
    if name in _GOOGLE_NETS:
        kwargs.setdefault("init_weights", False)
    model = builder(weights=None, **kwargs)
    if in_chans != 3:
        _replace_stem(model, name, in_chans)
    return model


def _smp_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    theirs = segmentation.check_encoder(kwargs["encoder_name"]) if "encoder_name" in kwargs else None
    if theirs is not None:
        check_name("timm", theirs)  # a name of the Hub would be fetched
    return segmentation.build_decoder(name, kwargs)


def torchvision_builder(name: str) -> Callable[..., nn.Module]:
    return _torchvision().get_model_builder(name)


def torchvision_urls(name: str) -> dict[str, Any]:
    """File name of every published weights file of a torchvision model -> its weights enum member."""
    try:
        published = _torchvision().get_model_weights(name)
    except ValueError:
        return {}
    return {weights.url.rpartition("/")[2]: weights for weights in published}


def _replace_stem(model: nn.Module, name: str, in_chans: Any) -> None:
    """torchvision's builders take three channels only; the first convolution is made anew for others."""
    if type(in_chans) is not int or in_chans < 1:
        raise SharefoldError(f"in_chans={in_chans!r} of {name}: give a positive number of channels")
    convs = ((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
    path, conv = next(convs, ("", None))
    if conv is None or conv.in_channels != 3 or conv.groups != 1:
        raise SharefoldError(f"tv:{name} has no plain first convolution: it takes 3 channels only")
    parent, _, child = path.rpartition(".")
    device = conv.weight.device
    fresh = nn.Conv2d(
        in_chans,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=device,
    )
    owner = model.get_submodule(parent)
    setattr(owner, child, fresh)
