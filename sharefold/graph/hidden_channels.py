"""Channels that live inside of one block: which layer makes them, what carries them, who reads them.

Such a channel can be left out if the layers that read it make up for it (:mod:`sharefold.methods.fold`). That takes a space with
one writer (squeeze-and-excitation layers that gate it aside), of which every reader is known. Every other space is named with the
reason why it has to stay whole.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from sharefold.graph.layers import is_layer_like
from sharefold.graph.records import LayerRecord, NetworkGraph, Space
from sharefold.layers import form_of
from sharefold.untrusted import exclude_pattern

# A reader's inverse moment has its features squared as entries: 300 MB in float64.
MOST_FEATURES = 6144


@dataclass(frozen=True)
class HiddenSpace:
    """Channels between one layer and those that read them.

    Attributes:
        writer: the layer that makes the channels, one output row each.
        gates: layers whose outputs multiply them (the second one of squeeze-and-excitation): one row each.
        through: norms, PReLUs and depthwise convolutions that they pass: one entry each.
        readers: layers that have h * w input columns for each.
        stage, role: of the writer.
    """

    writer: str
    channels: int
    gates: tuple[str, ...]
    through: tuple[str, ...]
    readers: tuple[str, ...]
    stage: int
    role: str

    @property
    def carriers(self) -> tuple[str, ...]:
        """Modules with a row or an entry for each channel."""
        return self.writer, *self.gates, *self.through

    @property
    def layers(self) -> tuple[str, ...]:
        """Every module that gets smaller with them."""
        return tuple(dict.fromkeys((*self.carriers, *self.readers)))


def hidden_spaces(
    model: nn.Module, graph: NetworkGraph, exclude: str | None = None
) -> tuple[list[HiddenSpace], dict[str, str]]:
    """The hidden spaces of ``model`` in forward order, and why the channels that other layers write have to stay.

    Args:
        model: the dense network of ``graph``.
        exclude: regular expression; a space stays whole if it matches the name of any module that carries it.

    Returns:
        (spaces, reasons by the name of the layer that writes the channels).

    Raises:
        SharefoldError: ``exclude`` is malformed.
    """
    pattern = exclude_pattern(exclude)
    found: list[HiddenSpace] = []
    reasons: dict[str, str] = {}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    owners.update(Counter(id(b) for _, b in model.named_buffers(remove_duplicate=False)))
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    written: set[int] = set()
    for name, record in graph.layers.items():
        space = graph.spaces.get(record.output_space)
        if graph.traced != "fx" or space is None:
            reasons[name] = "where its outputs go is not known"
            continue
        if space.id in written or name not in space.writers or name in space.gates:
            continue
        written.add(space.id)
        hidden = HiddenSpace(
            name, space.channels, space.gates, tuple(t for t in space.through if t not in space.gates),
            tuple(r for r in space.readers if r not in space.through), record.stage, record.role,
        )  # fmt: skip
        reason = _obstacle(model, graph, space, hidden, owners, places)
        if reason is None and pattern is not None:
            matched = [layer for layer in hidden.layers if pattern.search(layer)]
            reason = f"{matched[0]} is excluded" if matched else None
        if reason is None:
            found.append(hidden)
        else:
            reasons[name] = reason
    return found, reasons


def _obstacle(
    model: nn.Module, graph: NetworkGraph, space: Space, hidden: HiddenSpace, owners: Counter[int], places: Counter[int]
) -> str | None:
    """Why no channel of the space can be left out; None if some can."""
    if space.frozen or space.whole:
        return space.reason or space.whole
    if space.stream:
        return "several layers add into them"
    if not hidden.readers:
        return "no layer reads them"
    if space.channels < 2:
        return "there is only one"
    for name in hidden.layers:
        module = model.get_submodule(name)
        record = graph.layers.get(name)
        if record is not None and record.calls > 1:
            return f"{name} runs more than once"
        if any(places[id(part)] > 1 for part in module.modules()):
            return f"{name} is in two places of the network"
        tensors = [*module.parameters(), *module.buffers()]
        if any(owners[id(tensor)] > 1 for tensor in tensors):
            return f"{name} has tensors that other modules use too"
        if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in module.modules()):
            return f"{name} has hooks"
        if name not in hidden.readers and not _row_by_row(module, hidden.channels):
            return f"{name} holds tensors that are not one entry a channel"
    for name in hidden.readers:
        reason = _unreadable(model.get_submodule(name), graph.layers[name], hidden.channels)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _row_by_row(module: nn.Module, channels: int) -> bool:
    """Whether every tensor has a channel's numbers in one row, or one number for all."""
    if is_layer_like(module):
        return True
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return all(tensor.numel() == 1 or tensor.shape[0] == channels for tensor in tensors)


def _unreadable(module: nn.Module, record: LayerRecord, channels: int) -> str | None:
    form = form_of(module)
    if form is None or form.standardize is not None:
        return "standardises its weight, whatever it is made of"
    if form.groups > 1 or form.in_channels != channels:
        return "does not read each of them with columns of its own"
    if form.features > MOST_FEATURES:
        return f"has {form.features:,} inputs an output, too many to solve for"
    return None
