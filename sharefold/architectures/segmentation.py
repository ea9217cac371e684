"""Networks of segmentation_models_pytorch, an optional package: a decoder by name, its encoder by argument.

``smp:unet:encoder_name=resnet34,classes=2``. The package's own words ``classes`` and ``in_channels`` are kept as
``num_classes`` and ``in_chans``, as for every other library. Encoders' published weights are never fetched.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from sharefold.architectures.arguments import close_matches
from sharefold.architectures.optional import installed
from sharefold.errors import SharefoldError
from sharefold.untrusted import shown

PACKAGE = "segmentation_models_pytorch"
_OWN = {"classes": "num_classes", "in_channels": "in_chans"}
_TIMM = "tu-"  # before the name of an encoder that timm makes


def names() -> list[str]:
    """Decoders, sorted; none where the package is missing."""
    return sorted(_package().MODEL_ARCHITECTURES_MAPPING) if installed(PACKAGE) else []


def known_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a base: under the names that all libraries share, without what names weights."""
    found = {_OWN.get(key, key): value for key, value in kwargs.items()}
    found.pop("encoder_weights", None)
    return found


def check_decoder(name: str) -> None:
    """Refuses what is no decoder.

    Raises:
        SharefoldError: unknown name, or the package is missing.
    """
    if not installed(PACKAGE):
        raise SharefoldError(f"smp:{shown(name)} needs segmentation_models_pytorch: pip install segmentation-models-pytorch")
    known = names()
    if name not in known:
        hint = close_matches(name, known) or f"known are {', '.join(known)}"
        raise SharefoldError(f"unknown model smp:{shown(name)}: {hint}")


def check_encoder(encoder: Any) -> str | None:
    """The name of timm's network that an encoder's name asks for, None for the package's own.

    Raises:
        SharefoldError: the package has no such encoder.
    """
    own = _package().encoders.get_encoder_names()
    if isinstance(encoder, str) and encoder.startswith(_TIMM):
        return encoder[len(_TIMM) :]
    if encoder not in own:
        hint = close_matches(str(encoder), own) or f"timm's are written {_TIMM}resnet50"
        raise SharefoldError(f"unknown encoder {shown(encoder)} of segmentation_models_pytorch: {hint}")
    return None


def build_decoder(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """The network with random weights; bad arguments raise whatever the package raises."""
    words = {ours: own for own, ours in _OWN.items()}
    arguments = {words.get(key, key): value for key, value in kwargs.items()}
    return _package().create_model(name, **{**arguments, "encoder_weights": None})


def counts(model: nn.Module) -> tuple[int, int]:
    """Classes and input channels that a network was built with."""
    config: Any = model.config
    return int(config["classes"]), int(config["in_channels"])


def _package() -> Any:
    return importlib.import_module(PACKAGE)
