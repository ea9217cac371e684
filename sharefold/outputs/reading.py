"""What a network says: every output it returns, with the kind of its numbers, told once on a few images."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sharefold.errors import SharefoldError
from sharefold.graph import NetworkGraph
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, Tensors, each_of, elements, image_shape, taken
from sharefold.outputs.kinds import Seen, are_shares, may_change, tell
from sharefold.outputs.last_operations import Tail, tails_of
from sharefold.outputs.leaf import CLASSES, REGRESSION, Leaf, images_first
from sharefold.outputs.leaves import tensors_of
from sharefold.outputs.overrides import overridden, parse_overrides
from sharefold.outputs.own_word import OwnWord, own_word
from sharefold.outputs.taps import Tap, are_detections, listening, taps_of
from sharefold.running import batch_of, run_on

# Images of the two runs that show which axis counts them; of large ones as few as possible.
RUNS, LARGE_RUNS = (3, 5), (1, 2)
LARGE = 3 * 256 * 256
# Images that confirm what only values say, each run once; numbers of all of them, and of what the network says of them.
CONFIRMING, CONFIRMED = 256, 1 << 22
# Numbers of a sample that its place in the order is drawn by.
DRAWN_BY = 4096

Given = str | Iterable[str] | Mapping[str, str] | None


@dataclass(frozen=True)
class OutputReading:
    """How a network's outputs are taken and what they are.

    Attributes:
        leaves: the outputs that are compared.
        taps: modules to listen to instead of the network's end, where its results vary in number.
        left_out: tensors that are not compared, and why.
        detections: the network returns one dictionary of boxes, labels and scores an image.
    """

    leaves: list[Leaf] = field(default_factory=list)
    taps: list[Tap] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    detections: bool = False

    @property
    def comparable(self) -> bool:
        """Whether there is anything by which two networks can be compared."""
        return bool(self.leaves)

    @property
    def classes(self) -> Leaf | None:
        """The only output, where that is class logits or probabilities: a classifier or segmenter."""
        return self.leaves[0] if len(self.leaves) == 1 and self.leaves[0].kind in CLASSES else None

    def run(self, model: nn.Module, images: Input) -> list[Tensor]:
        """What ``model`` says on ``images``: one tensor (n, ...) a leaf, on the model's device, in its own type.

        Modes and gradients are the caller's.

        Raises:
            SharefoldError: the network returns other tensors than those that were read.
        """
        return self.run_raw(model, images)[1]

    def run_raw(self, model: nn.Module, images: Input) -> tuple[Any, list[Tensor]]:
        """As :meth:`run`, and what the network returned, as it is."""
        if not self.taps:
            output = run_on(model, images)
            return output, self.leaves_in(output, len(images))
        with listening(model, self.taps) as seen:
            output = run_on(model, images)
        return output, self.leaves_in(seen, len(images))

    def leaves_in(self, output: Any, images: int) -> list[Tensor]:
        """One tensor (images, ...) a leaf of what the network returned (or the taps gave) for so many images."""
        tensors = tensors_of(output)
        found = []
        for leaf in self.leaves:
            if leaf.source not in tensors:
                raise SharefoldError(f"output {leaf.source}: this network does not return it: read its outputs anew")
            found.append(leaf.take(tensors[leaf.source], images))
        return found

    def lines(self) -> list[tuple[str, str, str]]:
        """(name, kind, why) for people."""
        return [(leaf.name, leaf.text(), leaf.why) for leaf in self.leaves] + [
            (name, "not compared", why) for name, why in self.left_out.items()
        ]


def read_outputs(
    model: nn.Module, images: Tensors, graph: NetworkGraph | None = None, overrides: Given = None
) -> OutputReading:
    """Tells what every output of ``model`` is.

    Args:
        model: any network; left exactly as it was.
        images: (n, C, H, W) normalised, or a tuple of tensors (n, ...); eight are run, and some hundreds, of large ones fewer,
            where values alone say what they are. Which ones does not depend on their order.
        graph: of ``model``, whose last operations tell most; without one, values, names and the last layer do.
        overrides: the user's word: ``"logits:axis=1"``, ``"boxes:regression"``, several, or {name: kind}.

    Returns:
        A reading without leaves where there is nothing to compare.

    Raises:
        SharefoldError: an override that does not fit, or no images.
    """
    said, given = parse_overrides(overrides), taken(images)
    if len(given) == 0:
        raise SharefoldError("outputs: there are no images to read them on: give at least one")
    counts = RUNS if elements(given) < LARGE else LARGE_RUNS
    order = _by_content(given)
    batches = given[order[torch.arange(sum(counts)) % len(given)]].split(list(counts))
    with preserved(model):
        last = _LastLayer(model)
        with last:
            outputs = [run_on(model, batch) for batch in batches]
        detections = all(are_detections(output) for output in outputs)
        found, varying = _placed([tensors_of(output) for output in outputs], counts)
        taps: list[Tap] = []
        if varying or not found:
            taps = taps_of(model)
            found = _tapped(model, taps, batches, counts) if taps else {}
            taps = [tap for tap in taps if any(tap.covers(name) for name in found)]
    left_out = {name: one for name, one in found.items() if isinstance(one, str)}
    places = {name: one for name, one in found.items() if not isinstance(one, str)}
    tails: dict[str, Tail] = {}
    if not taps and graph is not None and graph.fx_graph is not None:
        tails = tails_of(graph.fx_graph, model)
    elif not taps and len(places) == 1 and (tail := last.tail(tensors_of(outputs[-1])[next(iter(places))])) is not None:
        tails = dict.fromkeys(places, tail)
    word, shape = own_word(model), image_shape(given)
    if any(may_change(_seen(name, places, tails, word, shape)) for name in places if not taps):
        largest = max(elements(given), *(place.values[0].numel() for place in places.values()))
        count = min(CONFIRMING, CONFIRMED // max(1, largest))
        places = _with_more(model, given[order[sum(counts) : count]], places)
    leaves = _told(places, taps, tails, word, shape)
    if said:
        shapes = {name: place.shape for name, place in places.items()}
        leaves = overridden(leaves, shapes, said, [name for name, place in places.items() if are_shares(place.values)])
    return OutputReading(leaves, taps, left_out, detections)


def _by_content(images: Input) -> Tensor:
    """Indices of all images in an order that is theirs, however they come."""
    keys = [0] * len(images)
    for tensor in each_of(images):
        flat = tensor.detach()[:, None].flatten(1)
        for index, row in enumerate(flat[:, :: -(-flat.shape[1] // DRAWN_BY) or 1].cpu().contiguous().view(torch.uint8)):
            keys[index] = zlib.crc32(row.numpy(), keys[index])
    return torch.tensor(sorted(range(len(keys)), key=keys.__getitem__))


@dataclass(frozen=True)
class _Place:
    """A tensor that both runs gave: where images are counted in it, and its values of both, images first."""

    images_axis: int
    per_image: int
    values: Tensor
    shape: tuple[int, ...]


def _placed(runs: list[dict[str, Tensor]], counts: tuple[int, ...]) -> tuple[dict[str, _Place | str], bool]:
    """Every tensor's place, or why it has none; and whether results vary in number."""
    if any(run.keys() != runs[0].keys() for run in runs):
        return {}, True
    found: dict[str, _Place | str] = {}
    for name in runs[0]:
        shapes = [tuple(run[name].shape) for run in runs]
        if len({len(shape) for shape in shapes}) > 1:
            return {}, True
        axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
        if not axes:
            found[name] = "it is the same for any number of images"
            continue
        sizes = [shape[axes[0]] for shape in shapes]
        if len(axes) > 1 or any(size % count or size == 0 for size, count in zip(sizes, counts, strict=True)):
            return {}, True
        each = {size // count for size, count in zip(sizes, counts, strict=True)}
        if len(each) > 1:
            return {}, True
        axis, per_image = axes[0], each.pop()
        values = torch.cat([_values(run[name], axis, per_image) for run in runs])
        found[name] = _Place(axis, per_image, values, shapes[0])
    return found, False


def _with_more(model: nn.Module, images: Input, places: dict[str, _Place]) -> dict[str, _Place]:
    """``places`` with what ``model`` says of more ``images``; as they are, where it does not return the same tensors."""
    found = {name: [place.values] for name, place in places.items()}
    with preserved(model):
        for batch in images.split(batch_of(images)) if len(images) else []:
            tensors = tensors_of(run_on(model, batch))
            for name, place in places.items():
                if name not in tensors:
                    return places
                values = _values(tensors[name], place.images_axis, place.per_image)
                if values.shape != (len(batch), *place.values.shape[1:]):
                    return places
                found[name].append(values)
    return {name: replace(place, values=torch.cat(found[name])) for name, place in places.items()}


def _values(tensor: Tensor, images_axis: int, per_image: int) -> Tensor:
    """Images first, complex numbers as pairs."""
    values = images_first(tensor.detach(), images_axis, per_image)
    return torch.view_as_real(values) if values.is_complex() else values


def _tapped(
    model: nn.Module, taps: list[Tap], batches: Iterable[Input], counts: tuple[int, ...]
) -> dict[str, _Place | str]:
    """What the taps give, without those whose results vary in number themselves."""
    runs: list[dict[str, Any]] = []
    for batch in batches:
        with listening(model, taps) as seen:
            run_on(model, batch)
        runs.append(dict(seen))
    found: dict[str, _Place | str] = {}
    for tap in taps:
        if all(tap.name in run for run in runs):
            places, varying = _placed([tensors_of({tap.name: run[tap.name]}) for run in runs], counts)
            found |= {tap.name: "its results vary in number"} if varying else places
    return found if any(isinstance(one, _Place) for one in found.values()) else {}


def _told(
    places: Mapping[str, _Place], taps: list[Tap], tails: Mapping[str, Tail], word: OwnWord, inputs: tuple[int, ...]
) -> list[Leaf]:
    leaves = []
    for name, place in places.items():
        tap = next((tap for tap in taps if tap.covers(name)), None)
        if tap is None:
            parts = tell(_seen(name, places, tails, word, inputs))
        else:  # a tap counts once, however many maps it gives
            parts = [replace(_of_tap(tap, name, place.values), weight=1 / sum(tap.covers(other) for other in places))]
        leaves += [replace(p, source=name, images_axis=place.images_axis, per_image=place.per_image) for p in parts]
    return leaves


def _seen(
    name: str, places: Mapping[str, _Place], tails: Mapping[str, Tail], word: OwnWord, inputs: tuple[int, ...]
) -> Seen:  # fmt: skip
    return Seen(name, places[name].values, inputs, tails.get(name), word, len(places) == 1)


def _of_tap(tap: Tap, name: str, values: Tensor) -> Leaf:
    """What a module inside of a network gives: numbers, but for what the network's class is known to give."""
    seen = Seen(name, values, (), None, OwnWord(), False)
    kind = tap.kind_of(name)
    if kind is None:
        return Leaf(name, REGRESSION, seen.channels, why="inside of the network, whose results vary in number")
    return Leaf(name, kind, 2 if values.ndim == 3 else seen.channels, why="so in networks of this class")


class _LastLayer:
    """Notes which convolution or Linear ran last: without a graph, all that is known of a network's end."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.name = model, ""
        self.output: Any = None
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and not any(True for _ in module.children()):
                self.handles.append(module.register_forward_hook(self._note(name)))

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.name, self.output = name, output

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def tail(self, answer: Tensor) -> Tail | None:
        """Of a network's only ``answer`` in the same run; complete where that is what the layer gave."""
        if not self.name:
            return None
        module = self.model.get_submodule(self.name)
        same = isinstance(self.output, Tensor) and self.output.numel() == answer.numel() and self.output.dtype == answer.dtype
        same = same and torch.equal(self.output.reshape(-1), answer.reshape(-1))
        outputs = getattr(module, "out_features", 0) or getattr(module, "out_channels", 0)
        return Tail(self.name, isinstance(module, nn.Linear), int(outputs), complete=same)
