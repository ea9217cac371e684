"""What the user says that an output is: ``logits:axis=1``, ``boxes=regression``, ``0=image`` ..."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from sharefold.errors import SharefoldError, unknown
from sharefold.outputs.leaf import CLASSES, GIVEN, IMAGE, KINDS, LABELS, MULTILABEL, PROBABILITIES, SCALES, YES_NO, Leaf

FORM = "write KIND or NAME:KIND, then :axis=N, :channels=A-B, :weight=W, :scale=S or :sigmoid, such as logits:axis=1"


@dataclass(frozen=True)
class Override:
    """One output's kind in the user's words.

    Attributes:
        name: of the output as ``inspect`` lists it; "" for all of them.
        kind: one of :data:`KINDS`, or "ignore".
        axis: of classes or channels, in the tensor as the network returns it; None leaves it as found.
        channels: (first, end) along the axis that are meant; several overrides of one output divide it.
        weight: in the sum over outputs.
        activated: sigmoid or softmax is done already; None leaves it as found.
        scale: of an image's values, one of :data:`SCALES`; "" leaves it to be told.
    """

    name: str
    kind: str
    axis: int | None = None
    channels: tuple[int, int] | None = None
    weight: float | None = None
    activated: bool | None = None
    scale: str = ""


def parse_overrides(given: str | Iterable[str] | Mapping[str, str] | None) -> list[Override]:
    """Overrides from one text, several, or a mapping of output names to kinds.

    Raises:
        SharefoldError: a text of another form, an unknown kind (names the nearest).
    """
    if given is None:
        return []
    if isinstance(given, str):
        return [_parse(given)]
    if isinstance(given, Mapping):
        return [_parse(f"{name}:{text}") for name, text in given.items()]
    return [_parse(text) for text in given]


def _parse(text: str) -> Override:
    words = [word.strip() for word in text.split(":")]
    name = ""
    if words[0] not in (*KINDS, "ignore") and len(words) > 1 and "=" not in words[1]:
        name, *words = words
    kind, *rest = words
    if kind not in (*KINDS, "ignore"):
        raise unknown("kind of output", kind, (*KINDS, "ignore"))
    found = Override(name, kind)
    for word in rest:
        if word in ("sigmoid", "softmax"):
            found = replace(found, activated=True)
        elif match := re.fullmatch(r"axis=(-?\d+)", word):
            found = replace(found, axis=int(match[1]))
        elif match := re.fullmatch(r"channels=(\d+)-(\d+)", word):
            found = replace(found, channels=(int(match[1]), int(match[2])))
        elif match := re.fullmatch(r"weight=(\d*\.?\d+)", word):
            found = replace(found, weight=float(match[1]))
            if not found.weight:
                raise SharefoldError(f"--outputs {text!r}: what has no weight is not compared: say ignore in place of {kind}")
        elif word.startswith("scale="):
            found = replace(found, scale=_scale(word[6:], kind))
        else:
            raise SharefoldError(f"--outputs {text!r}: {word!r} is not understood: {FORM}")
    return found


def _scale(text: str, kind: str) -> str:
    if kind != IMAGE:
        raise SharefoldError(f"--outputs {kind}:scale={text}: only an image has a scale: say {IMAGE}:scale={text}")
    if text not in SCALES:
        raise unknown("scale of an image", text, SCALES)
    return text


def overridden(
    leaves: list[Leaf], shapes: Mapping[str, tuple[int, ...]], overrides: Iterable[Override], shares: Collection[str] = ()
) -> list[Leaf]:  # fmt: skip
    """``leaves`` with what the user says in place of what was found.

    Args:
        leaves: as told.
        shapes: of the tensors as returned, by source.
        overrides: later ones of the same tensor add ranges of channels if they give some.
        shares: sources of tensors whose values all lie from 0 to 1: yes or no there has passed a sigmoid.

    Raises:
        SharefoldError: no output of that name, an axis or channels that it has not, one output said twice.
    """
    said: dict[str, list[Override]] = {}
    # A word on one output goes before a word on all, whichever comes first.
    for override in sorted(overrides, key=lambda one: one.name != ""):
        wanted = [name for name in shapes if override.name in ("", name)]
        if not wanted:
            raise SharefoldError(f"--outputs {override.name}: there is no such output: there are {', '.join(shapes)}")
        for name in wanted:
            if any(o.name == override.name and not (o.channels and override.channels) for o in said.get(name, [])):
                raise SharefoldError(f"--outputs: {name} is spoken of twice: say one thing, or give each a range of channels=A-B")
            said[name] = [*(o for o in said.get(name, []) if o.channels and override.channels), override]
    result: list[Leaf] = []
    done: set[str] = set()
    for leaf in leaves:
        if leaf.source not in said:
            result.append(leaf)
        elif leaf.source not in done:
            done.add(leaf.source)
            kept = [o for o in said[leaf.source] if o.kind != "ignore"]
            result += [_changed(leaf, o, shapes[leaf.source], leaf.source in shares) for o in kept]
    if not result:
        raise SharefoldError("--outputs: every output is ignored: keep one")
    return result


def _changed(leaf: Leaf, override: Override, shape: tuple[int, ...], shares: bool) -> Leaf:
    if leaf.kind == LABELS:
        raise SharefoldError(f"--outputs {leaf.source}: it holds whole numbers: only ignore is possible")
    axis = leaf.axis
    if override.axis is not None:
        if not -len(shape) <= override.axis < len(shape) or override.axis % len(shape) == leaf.images_axis:
            raise SharefoldError(f"--outputs {leaf.source}: axis {override.axis} of {shape} holds no classes: choose another")
        axis = _moved(override.axis % len(shape), leaf)
    if override.kind in (*CLASSES, MULTILABEL) and axis is None:
        raise SharefoldError(f"--outputs {leaf.source}: {shape} has no axis for {override.kind}: say axis=N")
    name = leaf.source
    if override.channels is not None:
        first, end = override.channels
        size = 0 if axis is None else shape[_returned(axis, leaf)]
        if not 0 <= first < end <= size:
            raise SharefoldError(f"--outputs {leaf.source}: channels {first}-{end} are not within the {size} of axis {axis}")
        name = f"{leaf.source}[{first}:{end}]"
    activated = override.activated
    if activated is None:
        activated = leaf.activated if override.kind == leaf.kind else shares and override.kind in YES_NO
    return replace(
        leaf, name=name, kind=override.kind, axis=axis, channels=override.channels,
        activated=activated or override.kind == PROBABILITIES,
        weight=leaf.weight if override.weight is None else override.weight, why=GIVEN, scale=override.scale,
    )  # fmt: skip


def _moved(dim: int, leaf: Leaf) -> int:
    """Axis with the images first of ``dim`` as returned."""
    moved = dim + 1 if dim < leaf.images_axis else dim
    return moved + 1 if leaf.per_image > 1 else moved


def _returned(axis: int, leaf: Leaf) -> int:
    """The inverse of :func:`_moved`."""
    dim = axis - 1 if leaf.per_image > 1 else axis
    return dim - 1 if dim <= leaf.images_axis else dim
