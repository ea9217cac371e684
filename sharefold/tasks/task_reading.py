"""Which of a network's outputs is measured against the truth, and as what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sharefold.data.truth import BOXES, IMAGES, MASKS
from sharefold.errors import SharefoldError
from sharefold.outputs import leaf as kinds
from sharefold.outputs.leaf import Leaf
from sharefold.outputs.reading import OutputReading


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        kind: "masks", "images" or "boxes".
        output: name of what is measured.
        leaves: indices of the outputs that are read; none where the network returns detections.
    """

    kind: str
    output: str
    leaves: tuple[int, ...] = ()


def task_of(reading: OutputReading, answers: Sequence[Tensor], annotated: bool) -> Task:
    """What the network's outputs can be measured by.

    Args:
        reading: of the network.
        answers: what its leaves are for a few images, (n, ...) each.
        annotated: the truth is objects in boxes, else masks or images.

    Raises:
        SharefoldError: no output of that kind, or masks and images both.
    """
    if annotated:
        return _boxes(reading)
    if reading.detections:
        raise SharefoldError("truth: the network returns detections, whose truth is a COCO annotation file: --truth FILE.json")
    found = [(_kind(leaf, answer), index) for index, (leaf, answer) in enumerate(zip(reading.leaves, answers, strict=True))]
    tasks = [(kind, index) for kind, index in found if kind]
    if reading.taps or not tasks:
        raise SharefoldError(
            f"truth: no output of the network is a mask or an image ({_said(reading)}): say what one is, such as "
            "--outputs logits:axis=1, binary or image"
        )
    if len({kind for kind, _ in tasks}) > 1:
        names = " and ".join(f"{reading.leaves[index].name} ({kind})" for kind, index in tasks)
        raise SharefoldError(f"truth: the network returns {names}: leave out what is not meant: --outputs NAME:ignore")
    kind, index = tasks[0]  # of several the first, as auxiliary heads come after the one that is meant
    return Task(kind, reading.leaves[index].name, (index,))


def _kind(leaf: Leaf, answer: Tensor) -> str:
    """The task of an output (n, ...), "" for none."""
    if leaf.kind == kinds.IMAGE and answer.ndim == 4:
        return IMAGES
    if leaf.kind in kinds.CLASSES and answer.ndim == 4:
        return MASKS
    one = answer.ndim == 3 or (answer.ndim == 4 and answer.shape[1] == 1)
    return MASKS if leaf.kind in (kinds.BINARY, kinds.LABELS) and one else ""


def _boxes(reading: OutputReading) -> Task:
    if reading.detections:
        return Task(BOXES, "detections")
    places = {kind: [i for i, leaf in enumerate(reading.leaves) if leaf.kind == kind] for kind in (kinds.BOXES, kinds.SCORES)}
    for boxes in places[kinds.BOXES]:
        source = reading.leaves[boxes].source
        near = sorted(places[kinds.SCORES], key=lambda index: reading.leaves[index].source != source)
        if near:  # of the same tensor if there are some
            return Task(BOXES, source, (boxes, near[0]))
    raise SharefoldError(
        f"truth: the network returns no boxes beside scores ({_said(reading)}): give a folder of masks or images, or say where "
        "they are: --outputs boxes:channels=0-4 --outputs scores:channels=4-84, or scores:channels=4-84:sigmoid where the scores "
        "lie between 0 and 1 already"
    )


def _said(reading: OutputReading) -> str:
    return "; ".join(f"{name}: {kind}, {why}" for name, kind, why in reading.lines()[:3]) or "it returns nothing that can be read"
