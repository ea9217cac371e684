"""Named models with their published weights."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from sharefold.architectures import segmentation
from sharefold.architectures.build import (
    SOURCE_PREFIXES,
    build_base,
    build_on_meta,
    check_arguments,
    check_name,
    make_base,
    torchvision_urls,
)
from sharefold.architectures.shapes import load_weights, shapes_of
from sharefold.errors import SharefoldError
from sharefold.offline import offline_when_unreachable


def open_timm(name: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model of timm's registry and its base, which names the class count.

    Raises:
        SharefoldError: unknown name, bad arguments, no such weights, or the download failed.
    """
    check_name("timm", name)
    base = make_base("timm", name, kwargs)
    if not pretrained:
        model = build_base(base)
    else:
        build_on_meta(base)  # bad arguments fail here, so that what fails below is the download
        model = _pretrained_timm(name, kwargs)
    return model, _with_classes(base, model)


def open_torchvision(name: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A model of torchvision and its base; another class count or input channels get fresh layers.

    Raises:
        SharefoldError: as :func:`open_timm`.
    """
    check_name("torchvision", name)
    if not pretrained:
        base = make_base("torchvision", name, kwargs)
        return build_base(base), base
    published = torchvision_urls(name)
    if not published:
        raise SharefoldError(f"tv:{name} has no published weights: use --no-pretrained or a local file")
    weights = importlib.import_module("torchvision.models").get_model_weights(name).DEFAULT
    if name in ("googlenet", "inception_v3"):
        # The published weights expect this transform; GoogLeNet's auxiliary heads hold no useful weights.
        kwargs = {"transform_input": True, "aux_logits": name == "inception_v3", **kwargs}
    if name.startswith(("fcn_", "deeplabv3_")):
        kwargs = {"aux_loss": True, **kwargs}
    base = make_base("torchvision", name, kwargs)
    model = build_base(base)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise _no_download(f"tv:{name}", error) from None
    target = shapes_of(model.state_dict())
    if name == "googlenet":
        state = {key: tensor for key, tensor in state.items() if key in target}
    fresh = set()
    if "num_classes" in kwargs or "in_chans" in kwargs:
        fresh = {key for key, tensor in state.items() if key in target and tuple(tensor.shape) != target[key]}
    load_weights(model, state, f"published weights of {name}", f"tv:{name}", skip=fresh)
    return model, base


def open_smp(name: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A network of segmentation_models_pytorch with random weights, and its base.

    Raises:
        SharefoldError: the package is missing, an unknown name, bad arguments, or weights were asked for: there are none by name.
    """
    instead = (
        f" has no published weights: give the folder that save_pretrained wrote, or a checkpoint file with "
        f"--arch smp:{name}:encoder_name=..."
    )
    return _unpublished("smp", name, segmentation.known_arguments(kwargs), pretrained, instead)


def open_yolo(name: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A network of ultralytics with random weights, and its base.

    Raises:
        SharefoldError: the package is missing, an unknown name, bad arguments, or weights were asked for: they come from a file.
    """
    return _unpublished("ultralytics", name, kwargs, pretrained, f": give the trained file, yolo:{name}.pt --trust-pickle")


def _unpublished(
    library: str, name: str, kwargs: dict[str, Any], pretrained: bool, instead: str
) -> tuple[nn.Module, dict[str, Any]]:
    check_name(library, name)
    if pretrained:
        raise SharefoldError(f"{SOURCE_PREFIXES[library]}:{name}{instead}; --no-pretrained takes random weights")
    base = make_base(library, name, kwargs)
    return build_base(base), base


def open_hub(identifier: str, kwargs: dict[str, Any], pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A timm model of the Hugging Face Hub, ``owner/name[@revision]``.

    Raises:
        SharefoldError: not reachable, no timm model, or arguments that are not allowed.
    """
    timm = importlib.import_module("timm")
    hub = importlib.import_module("timm.models")
    where = f"hf-hub:{identifier}"
    try:
        with offline_when_unreachable():
            _, name, arguments = hub.load_model_config_from_hf(identifier)
    except Exception as error:
        raise _no_download(where, error, "use a local file, and check the name") from None
    arguments = {**(arguments or {}), **kwargs}
    check_name("timm", name)
    check_arguments(name, arguments)
    try:
        with offline_when_unreachable():
            model = timm.create_model(where, pretrained=pretrained, **kwargs)
    except Exception as error:
        raise _no_download(where, error) from None
    return model.eval(), _with_classes(make_base("timm", name, arguments), model)


def _pretrained_timm(name: str, kwargs: dict[str, Any]) -> nn.Module:
    timm = importlib.import_module("timm")
    plain = name.partition(".")[0]
    config = importlib.import_module("timm.models").get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        tags = ", ".join(timm.list_pretrained(f"{plain}.*"))
        hint = f"published are {tags}" if tags else "use --no-pretrained or a local file"
        raise SharefoldError(f"timm:{name} has no published weights: {hint}")
    try:
        with offline_when_unreachable():
            return timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as error:
        raise _no_download(f"timm:{name}", error) from None


def _with_classes(base: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The default class count of a name may change with the library; the base holds on to the present one."""
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        base["kwargs"].setdefault("num_classes", classes)
    return base


def _no_download(name: str, error: Exception, advice: str = "use --no-pretrained or a local file") -> SharefoldError:
    lines = str(getattr(error, "reason", error)).strip().splitlines()  # URLError wraps what the system said
    reason = lines[0].split(". ")[0][:160].rstrip(" .:") if lines else type(error).__name__
    return SharefoldError(f"could not download weights of {name}: {reason}: {advice}")
