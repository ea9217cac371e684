"""Networks whose results vary in number are compared at the outputs of backbone, neck and heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sharefold.outputs.leaf import LOGITS, MULTILABEL

# torchvision's detectors: modules to listen to, and what the heads of each give: (pattern of a tensor's name, kind).
DETECTORS: dict[str, dict[str, tuple[tuple[str, str], ...]]] = {
    "GeneralizedRCNN": {
        "backbone": (), "rpn.head": ((r"\.0\.\d+", MULTILABEL),), "roi_heads.box_predictor": ((r"\.0", LOGITS),),
    },
    "RetinaNet": {"backbone": (), "head": ((r"\.cls_logits", MULTILABEL),)},
    "FCOS": {"backbone": (), "head": ((r"\.(cls_logits|bbox_ctrness)", MULTILABEL),)},
    "SSD": {"backbone": (), "head": ((r"\.cls_logits", LOGITS),)},
}  # fmt: skip
# Sides of the regions that both networks' box heads look at, as shares of the image; each at the places of a grid.
REGIONS = ((0.5, 0.5), (0.25, 0.25), (0.5, 0.25))


@dataclass(frozen=True)
class Tap:
    """A module at whose output networks are compared.

    Attributes:
        name: of the module.
        kinds: what is known of its tensors: (pattern of what follows the module's name, kind).
    """

    name: str
    kinds: tuple[tuple[str, str], ...] = ()

    def covers(self, tensor: str) -> bool:
        """Whether the tensor of this name comes from this module."""
        return tensor == self.name or tensor.startswith(f"{self.name}.")

    def kind_of(self, tensor: str) -> str | None:
        """The kind of the tensor of this name, where the network's class says."""
        found = (kind for pattern, kind in self.kinds if re.fullmatch(pattern, tensor.removeprefix(self.name)))
        return next(found, None)


def taps_of(model: nn.Module) -> list[Tap]:
    """Where to listen: known places of torchvision's detectors, else the root's children that hold parameters.

    A root with one such child is opened: the network may be wrapped.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith("torchvision.models.detection") and kind.__name__ in DETECTORS:
            return [Tap(name, kinds) for name, kinds in DETECTORS[kind.__name__].items() if _has(model, name)]
    children = [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    if len(children) == 1:
        inner = taps_of(model.get_submodule(children[0]))
        if any(tap.kinds for tap in inner):
            return [Tap(f"{children[0]}.{tap.name}", tap.kinds) for tap in inner]
    return [Tap(name) for name in children]


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


@contextmanager
def listening(model: nn.Module, taps: list[Tap]) -> Iterator[dict[str, Any]]:
    """What the tapped modules give in their last run; box heads look at the same regions in every network."""
    seen: dict[str, Any] = {}
    with ExitStack() as stack:

        def listen(name: str) -> None:
            def keep(module: nn.Module, inputs: Any, output: Any) -> None:
                seen[name] = output

            stack.callback(model.get_submodule(name).register_forward_hook(keep).remove)

        for tap in taps:
            listen(tap.name)
            if tap.name.endswith("roi_heads.box_predictor"):
                rpn = model.get_submodule(tap.name.removesuffix("roi_heads.box_predictor") + "rpn")
                stack.callback(rpn.register_forward_hook(_same_regions).remove)
        yield seen


def _same_regions(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """In place of a network's own proposals, which no other network makes: a grid of regions on every image."""
    images, (proposals, losses) = inputs[0], output
    size = [torch.tensor([width, height, width, height]) for height, width in images.image_sizes]
    grid = _grid()
    return [(grid * s).to(p) for s, p in zip(size, proposals, strict=True)], losses


def _grid() -> Tensor:
    """(R, 4) corners x1, y1, x2, y2 as shares of the image."""
    found = []
    for width, height in REGIONS:
        for top in torch.arange(0, 1 - height + 1e-6, height / 2).tolist():
            for left in torch.arange(0, 1 - width + 1e-6, width / 2).tolist():
                found.append([left, top, left + width, top + height])
    return torch.tensor(found)


def are_detections(output: Any) -> bool:
    """Whether ``output`` is one dictionary of boxes, labels and scores an image."""
    return (
        isinstance(output, (list, tuple))
        and len(output) > 0
        and all(isinstance(one, Mapping) and {"boxes", "labels", "scores"} <= one.keys() for one in output)
    )
