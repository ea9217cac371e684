"""Tells what an output's numbers are: from values, last operations, names and the network's own word, in that order of trust.

Squared error over the variance is right for everything, if not the best for classes. So numbers are taken for classes only
where something says so; else they are a regression, and ``why`` says that it could not be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharefold.outputs import leaf as kinds
from sharefold.outputs.last_operations import Tail
from sharefold.outputs.leaf import Leaf
from sharefold.outputs.own_word import OwnWord, hint_of

NEAR = 2e-3  # of sums and norms to 1, in half precision too
SMALLEST_EMBEDDING = 8
WIDE = 64  # so many pooled channels are features rather than classes
CUT = 0.01  # more exact zeros come from a ReLU, not from a sigmoid
DECIDED = 0.1  # values of masks are nearer than this to 0 or 1, most of them


@dataclass(frozen=True)
class Seen:
    """All that is known of one output tensor.

    Attributes:
        name: as :func:`sharefold.outputs.leaves.tensors_of` gives it.
        values: (images, ...), images first, as the network computes them.
        inputs: shape (C, H, W) of an image, of several inputs of the first one that is an image.
        tail: its last operations, None where they are not known.
        word: what the network says of itself.
        alone: the network returns no other tensor.
    """

    name: str
    values: Tensor
    inputs: Sequence[int]
    tail: Tail | None
    word: OwnWord
    alone: bool

    def axis_of(self, dim: int | None) -> int | None:
        """``dim`` counted from the front; None for the images' or none."""
        if dim is None or not -self.values.ndim <= dim < self.values.ndim:
            return None
        return dim % self.values.ndim or None

    @property
    def channels(self) -> int | None:
        """Axis of the channels: 1 of vectors and maps; of (n, A, B) the one of a last Linear, else the smaller one."""
        shape = self.values.shape
        if len(shape) == 3:
            if self.tail is not None and self.tail.linear and self.tail.outputs == shape[2]:
                return 2
            return 1 if shape[1] <= shape[2] else 2
        return 1 if len(shape) > 1 else None


def tell(seen: Seen) -> list[Leaf]:
    """The leaves of one tensor: one, or its ranges of channels where boxes and scores share it."""
    values, name = seen.values, seen.name
    if not values.is_floating_point():
        return [Leaf(name, kinds.LABELS, why="whole numbers")]
    values = values.float()
    shown = values[values != -math.inf]  # minus infinity is that of a class that is not to be chosen
    if shown.numel() == 0 or not bool(torch.isfinite(shown).all()):
        return [Leaf(name, kinds.REGRESSION, seen.channels, why="some values are not finite")]
    return _by_values(seen, values) or [_by_word(seen, values) or _by_shape(seen, values)]


def may_change(seen: Seen) -> bool:
    """Whether the values say something of these images that others may not bear out: that they are shares, say. Where a softmax
    is known to be behind them they always are."""
    if seen.tail is not None and seen.tail.ends_in("softmax", "log_softmax"):
        return False
    if not seen.values.is_floating_point() or seen.values.numel() == 0:
        return False
    return are_shares(seen.values) or bool(_by_values(seen, seen.values.float()))


def _by_values(seen: Seen, values: Tensor) -> list[Leaf]:
    """Shares, unit vectors, and boxes with scores, of all images; masked values are none of these, but may be logarithms."""
    found = _normalised(seen, values)
    if found or bool(torch.isinf(values).any()):
        return found
    if found := _detections(seen, values):
        return found
    between = _between_0_and_1(seen, values)
    return [] if between is None else [between]


def are_probabilities(values: Tensor, axis: int = 1) -> bool:
    """Whether ``values`` are shares that sum to 1 over two or more along ``axis``: a softmax is done already."""
    return values.shape[axis] > 1 and float(values.min()) >= 0 and _all_near(values.float().sum(axis), 1.0)


def are_shares(values: Tensor) -> bool:
    """Whether these are numbers from 0 to 1, not all of them the same."""
    return values.is_floating_point() and values.numel() > 0 and 0 <= float(values.min()) < float(values.max()) <= 1


def _normalised(seen: Seen, values: Tensor) -> list[Leaf]:
    """Probabilities, log-probabilities and unit vectors: these say themselves what they are."""
    tail = seen.tail
    for axis in _likely_axes(seen):
        if values.shape[axis] < 2:
            continue
        if are_probabilities(values, axis):
            return [Leaf(seen.name, kinds.PROBABILITIES, axis, activated=True, why=f"sums to 1 over axis {axis}")]
        if float(values.max()) <= NEAR and _all_near(values.logsumexp(axis), 0.0):
            return [Leaf(seen.name, kinds.LOGITS, axis, why=f"logarithms of shares that sum to 1 over axis {axis}")]
        if values.shape[axis] >= SMALLEST_EMBEDDING and _all_near(values.norm(dim=axis), 1.0):
            return [Leaf(seen.name, kinds.EMBEDDING, axis, why=f"of length 1 over axis {axis}")]
    if tail is not None and tail.ends_in("normalize"):
        return [Leaf(seen.name, kinds.EMBEDDING, seen.channels, why="ends in a normalisation")]
    return []


def _likely_axes(seen: Seen) -> list[int]:
    """Axes to look over, what a softmax says first."""
    said = seen.axis_of(seen.tail.classes) if seen.tail is not None else None
    rest = [axis for axis in (1, seen.values.ndim - 1) if axis > 0]
    return list(dict.fromkeys(([said] if said else []) + rest)) if seen.values.ndim > 1 else []


def _all_near(values: Tensor, wanted: float) -> bool:
    return bool(((values - wanted).abs() < NEAR).all())


def _detections(seen: Seen, values: Tensor) -> list[Leaf]:
    """Boxes and scores in one tensor (n, 4 + classes, anchors) or (n, anchors, 4 + classes)."""
    if values.ndim != 3:
        return []
    ranges, why = _joined(seen), "put together by the last operation"
    axis = seen.axis_of(seen.tail.joined) if seen.tail is not None else None
    if ranges and axis:
        total = ranges[-1][2]
        if total != values.shape[axis]:
            ranges = []
    if not ranges or axis is None:
        for axis in (1, 2):
            size = values.shape[axis]
            if seen.word.detected is not None and size >= 4 + seen.word.detected:
                end = 4 + seen.word.detected
                ranges = [("boxes", 0, 4), ("scores", 4, end)] + ([("rest", end, size)] if size > end else [])
                why = "the network's task and class names"
                break
            if size > 4 and values.shape[3 - axis] > 1:
                boxes, scores = values.narrow(axis, 0, 4), values.narrow(axis, 4, size - 4)
                beyond = boxes.movedim(axis, 0).flatten(1).abs().amax(1)
                if float(beyond.min()) > 1 and float(scores.min()) >= 0 and float(scores.max()) <= 1:
                    ranges = [("boxes", 0, 4), ("scores", 4, size)]
                    why = "four channels beyond 1, all others between 0 and 1"
                    break
    if not ranges or axis is None:
        return []
    parts = []
    for what, first, end in ranges:
        part = values.narrow(axis, first, end - first)
        inside = float(part.min()) >= 0 and float(part.max()) <= 1
        kind = kinds.BOXES if what == "boxes" else kinds.SCORES if what == "scores" else kinds.REGRESSION
        parts.append(
            Leaf(f"{seen.name}[{first}:{end}]", kind, axis, (first, end), activated=inside and kind == kinds.SCORES, why=why)
        )
    return parts


def _joined(seen: Seen) -> list[tuple[str, int, int]]:
    """(what, first, end) of tensors concatenated last, if some of them are sigmoids and others are not."""
    if seen.tail is None or not seen.tail.parts:
        return []
    ranges: list[tuple[str, int, int]] = []
    first = 0
    for tail, size in seen.tail.parts:
        what = "scores" if tail.ends_in("sigmoid") else "boxes" if size == 4 else "rest"
        ranges.append((what, first, first + size))
        first += size
    return ranges if len({what == "scores" for what, *_ in ranges}) == 2 else []


def _between_0_and_1(seen: Seen, values: Tensor) -> Leaf | None:
    """Sigmoids: a mask, yes or no, several of those, or an image."""
    tail = seen.tail
    known = tail is not None and tail.complete and bool(tail.layer or tail.activations)
    sigmoid = tail is not None and tail.ends_in("sigmoid")
    cut = float((values == 0).float().mean()) > CUT
    if not are_shares(values) or (known and not sigmoid) or (cut and not sigmoid):
        return None
    why = "a sigmoid" if sigmoid else "all values lie between 0 and 1"
    axis = seen.channels
    count = 1 if axis is None else values.shape[axis]
    if values.ndim == 4 and _image_channels(seen):
        decided = float(((values < DECIDED) | (values > 1 - DECIDED)).float().mean())
        if count > 1 or decided < 0.5:
            return Leaf(seen.name, kinds.IMAGE, 1, why=f"{why}, of an image's shape")
    if count == 1 or values.ndim == 3:
        return Leaf(seen.name, kinds.BINARY, axis, activated=True, why=why)
    return Leaf(seen.name, kinds.MULTILABEL, axis, activated=True, why=why)


def _by_word(seen: Seen, values: Tensor) -> Leaf | None:
    """What the network, its graph or a name says."""
    tail, word, shape = seen.tail, seen.word, values.shape
    said = seen.axis_of(tail.classes) if tail is not None else None
    if said and shape[said] > 1:
        return Leaf(seen.name, kinds.LOGITS, said, why=f"an argmax reads it over axis {said}")
    if word.segments and values.ndim >= 4:
        if shape[1] == 1:
            return Leaf(seen.name, kinds.BINARY, 1, why="a segmentation network of one class")
        return Leaf(seen.name, kinds.LOGITS, 1, why="a segmentation network")
    if word.classes is not None and seen.channels is not None and shape[seen.channels] == word.classes > 1:
        return Leaf(seen.name, kinds.LOGITS, seen.channels, why=f"the network says that it has {word.classes} classes")
    if word.classes == 0 and values.ndim == 2:
        return Leaf(seen.name, kinds.EMBEDDING, 1, why="the network says that it has no classifier")
    axis = seen.channels
    hint, where = hint_of(seen.name), f"the output's name, {seen.name}"
    if hint is None and tail is not None and tail.layer:
        hint, where = hint_of(tail.layer), f"the last layer's name, {tail.layer}"
        hint = hint if hint in ("logits", "regression") else None
    if hint == "logits" and axis is not None:
        if shape[axis] == 1:
            return Leaf(seen.name, kinds.BINARY, axis, why=where)
        return Leaf(seen.name, kinds.LOGITS, axis, why=where)
    if hint == "image" and values.ndim == 4:
        return Leaf(seen.name, kinds.IMAGE, 1, why=where)
    if hint == "embedding" and values.ndim == 2:
        return Leaf(seen.name, kinds.EMBEDDING, 1, why=where)
    return Leaf(seen.name, kinds.REGRESSION, axis, why=where) if hint in ("regression", "embedding") else None


def _by_shape(seen: Seen, values: Tensor) -> Leaf:
    """What is usual for such a shape behind such a layer; a regression where nothing is."""
    tail, shape, axis = seen.tail, values.shape, seen.channels
    if values.ndim == 4 and _image_channels(seen) and (shape[1] == seen.inputs[0] or shape[1] == 3):
        return Leaf(seen.name, kinds.IMAGE, 1, why="of an image's shape")
    if axis is None or shape[axis] == 1 or values.ndim > 3:
        hint = "; say binary if it is yes or no" if axis is None or shape[axis] == 1 else "; say logits if it is classes"
        return Leaf(seen.name, kinds.REGRESSION, axis, why=f"cannot be told{hint}")
    if seen.alone:
        if tail is not None and tail.linear and tail.outputs == shape[-1]:
            return Leaf(seen.name, kinds.LOGITS, values.ndim - 1, why="a Linear gives it, and nothing else is given")
        if values.ndim == 2:
            features = tail is not None and shape[1] >= WIDE and (tail.ends_in("relu") or not tail.layer)
            kind = kinds.EMBEDDING if features else kinds.LOGITS
            return Leaf(seen.name, kind, 1, why="features of no Linear" if features else "one row of numbers an image")
    return Leaf(seen.name, kinds.REGRESSION, axis, why="cannot be told; say logits if it is classes")


def _image_channels(seen: Seen) -> bool:
    """Whether (n, c, h, w) has an image's channels, and the input's height and width or a multiple of them."""
    if len(seen.inputs) != 3 or seen.values.ndim != 4:
        return False
    _, channels, *size = seen.values.shape
    height, width = seen.inputs[1:]
    fits = size[0] % height == 0 and size[1] % width == 0 and size[0] // height == size[1] // width > 0
    return fits and channels in (1, 3, seen.inputs[0])
