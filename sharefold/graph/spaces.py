"""Channel spaces: which layers write and read the same channels, in the same order.

Every node of the fx graph that carries channels points at a space and says on which axis they lie. A convolution or
Linear starts a new space; elementwise operations unify the spaces of their operands; norms, activations and pooling
keep them. Operations that look at the order of channels (concatenation along them, slices, reshapes that split them,
anything unknown) freeze the spaces involved. Grouped convolutions freeze both sides, because a permutation would have
to respect the groups; depthwise ones keep the space, except when they multiply the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from sharefold.graph import ops
from sharefold.graph.layers import is_layer_like
from sharefold.graph.space_set import Chan, SpaceSet
from sharefold.layers import ConvForm

MODEL_INPUT, MODEL_OUTPUT = "the input of the model", "an output of the model"


@dataclass
class Flow:
    """Result of :func:`propagate`."""

    spaces: SpaceSet
    values: dict[fx.Node, Any]  # Chan, list of Chan or None, or None
    inputs: dict[str, Chan | None]  # per layer, first call
    outputs: dict[str, Chan | None]
    token_mixing: set[str]  # Linears that mix positions, not channels
    gates: list[tuple[fx.Node, fx.Node]]  # (product, its gate operand)
    additions: list[fx.Node]  # sums of two maps


def shape_of(node: Any) -> Any:
    """Shape that the run left on an fx node; None for constants and non-tensors."""
    return node.meta.get("shape") if isinstance(node, fx.Node) else None


def propagate(graph: fx.Graph, model: nn.Module, layers: dict[str, ConvForm]) -> Flow:
    """Walks the graph once in order; ``node.meta["shape"]`` must be present (see ``trace.ShapeRecorder``).

    Args:
        layers: the shareable layers; any other convolution or Linear freezes what it touches.
    """
    return _Propagation(model, layers).run(graph)


class _Propagation:
    def __init__(self, model: nn.Module, layers: dict[str, ConvForm]) -> None:
        self.model = model
        self.layers = layers
        self.flow = Flow(SpaceSet(), {}, {}, {}, set(), [], [])
        self.spaces = self.flow.spaces
        self.channelwise: dict[str, int] = {}

    def run(self, graph: fx.Graph) -> Flow:
        for node in graph.nodes:
            value = self.flow.values[node] = self.visit(node)
            if "seen" in node.meta:
                for chan in value if isinstance(value, list) else [value]:
                    if isinstance(chan, Chan):
                        self.spaces.freeze(chan.space, node.meta["seen"])
        return self.flow

    # Small helpers -----------------------------------------------------------------------------------------------

    def value(self, node: Any) -> Any:
        return self.flow.values.get(node) if isinstance(node, fx.Node) else None

    def chan(self, node: Any) -> Chan | None:
        value = self.value(node)
        return value if isinstance(value, Chan) else None

    def chans(self, node: fx.Node) -> list[Chan]:
        """Channels of every operand, those inside lists included."""
        found: list[Chan] = []
        for operand in node.all_input_nodes:
            value = self.value(operand)
            found.extend(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Chan))
        return found

    def opaque(self, node: fx.Node, what: str) -> Chan | None:
        """Freezes all operands of a step whose effect on channels is unknown. No tensor comes out: no effect.

        The result has no known channels.
        """
        if node.meta.get("shape") is not None:
            for chan in self.chans(node):
                self.spaces.freeze(chan.space, what)
        return None

    def fresh(self, channels: int, axis: int, reason: str = "") -> Chan:
        return Chan(self.spaces.new(channels, reason), axis)

    # Dispatch ----------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> Any:
        shape = shape_of(node)
        if node.op == "placeholder":
            if isinstance(shape, tuple) and len(shape) == 4:
                return self.fresh(shape[1], 1, MODEL_INPUT)
            return None
        if node.op == "output":
            for chan in self.chans(node):
                self.spaces.freeze(chan.space, MODEL_OUTPUT)
            return None
        if node.op == "get_attr":
            return None
        if node.op == "call_module":
            return self.module(node, self.model.get_submodule(str(node.target)))
        name = ops.op_name(node)
        handler: Callable[[fx.Node], Any] | None = getattr(self, f"op_{ops.FAMILY.get(name, 'opaque')}", None)
        assert handler is not None
        return handler(node)

    # Modules -----------------------------------------------------------------------------------------------------

    def module(self, node: fx.Node, module: nn.Module) -> Any:
        name = str(node.target)
        if name in self.layers:
            return self.layer(node, name, self.layers[name])
        if is_layer_like(module):
            return self.unshared_layer(node, name)
        kind = ops.module_family(module, self.chan(ops.first_operand(node)), shape_of(ops.first_operand(node)))
        if kind == "channelwise":
            chan = self.keep(node)
            if chan is not None and ops.mixes_channels(module):
                self.spaces.bind(chan.space, f"{name} ({type(module).__name__}) looks at all of them together")
            if chan is not None and any(True for _ in (*module.parameters(), *module.buffers())):
                through = self.spaces[chan.space].through
                if name not in through:
                    through.append(name)
                # a module with tensors that runs several times ties the spaces of all its calls
                self.spaces.unite(self.channelwise.setdefault(name, chan.space), chan.space)
            return chan
        if kind == "reshape":
            return self.op_reshape(node)
        return self.opaque(node, f"read by {name} ({type(module).__name__})")

    def layer(self, node: fx.Node, name: str, form: ConvForm) -> Chan | None:
        source = ops.first_operand(node)
        chan, shape = self.chan(source), shape_of(source)
        if not isinstance(shape, tuple) or not isinstance(shape_of(node), tuple):
            return self.opaque(node, f"read by {name}")
        axis = len(shape) + form.channel_axis
        if chan is not None and chan.axis != axis:
            if form.kind == "linear":
                self.flow.token_mixing.add(name)
                return chan
            self.spaces.freeze(chan.space, f"{name} reads them on another axis")
            chan = None
        if chan is not None:
            self.read(chan, name, form)
        pooled = chan.pooled if chan is not None else form.kind == "linear" and len(shape) == 2
        before = self.flow.outputs.get(name)
        if form.depthwise and form.out_channels == form.in_channels and not form.transposed:
            out = None if chan is None else replace(chan, pooled=pooled)
        elif before is not None:
            out = Chan(before.space, axis, pooled)
        else:
            out = Chan(self.spaces.new(form.out_channels), axis, pooled)
            self.spaces[out.space].writers.append(name)
            if form.groups > 1 or form.transposed:
                self.spaces.freeze(out.space, f"written by the {_kind(form)} convolution {name}")
        earlier = self.flow.inputs.get(name)
        if chan is not None and earlier is not None:
            self.spaces.unite(earlier.space, chan.space)
        self.flow.inputs.setdefault(name, chan)
        self.flow.outputs.setdefault(name, out)
        return out

    def read(self, chan: Chan, name: str, form: ConvForm) -> None:
        draft = self.spaces[chan.space]
        if form.depthwise and form.out_channels == form.in_channels and not form.transposed:
            if name not in draft.through:
                draft.through.append(name)
            return
        if name not in draft.readers:
            draft.readers.append(name)
        if form.groups > 1 or form.transposed:
            self.spaces.freeze(chan.space, f"read by the {_kind(form)} convolution {name}")

    def unshared_layer(self, node: fx.Node, name: str) -> Chan | None:
        self.opaque(node, f"read by {name}, which is not shared")
        shape, source = shape_of(node), self.chan(ops.first_operand(node))
        if source is None or not isinstance(shape, tuple) or source.axis >= len(shape):
            return None
        return self.fresh(shape[source.axis], source.axis, f"written by {name}, which is not shared")

    # Functions and methods ---------------------------------------------------------------------------------------

    def op_opaque(self, node: fx.Node) -> Any:
        return self.opaque(node, f"read by {ops.op_name(node)}")

    def op_nothing(self, node: fx.Node) -> Any:
        return None

    def op_keep(self, node: fx.Node) -> Any:
        chan = self.keep(node)
        if chan is not None and ops.op_name(node) in ops.MIXING:
            self.spaces.bind(chan.space, f"{ops.op_name(node)} looks at all of them together")
        return chan

    def keep(self, node: fx.Node) -> Chan | None:
        """Same rank and channel count out as in; anything else is opaque."""
        source = ops.first_operand(node)
        chan, before, after = self.chan(source), shape_of(source), shape_of(node)
        if chan is None:
            return self.opaque(node, f"read by {ops.op_name(node)}")
        if not isinstance(after, tuple) or len(after) != len(before) or after[chan.axis] != before[chan.axis]:
            return self.opaque(node, f"read by {ops.op_name(node)}")
        if ops.slides_along(ops.window_name(node, self.model), len(before), chan.axis):
            return self.opaque(node, f"{ops.op_name(node)} mixes neighbours among them")
        if ops.is_global_pool(node, self.model, before, after, chan.axis):
            return replace(chan, pooled=True)
        return chan

    def op_elementwise(self, node: fx.Node) -> Chan | None:
        out = shape_of(node)
        if not isinstance(out, tuple):
            return self.op_opaque(node)
        operands = []
        for operand in node.all_input_nodes:
            shape, chan = shape_of(operand), self.chan(operand)
            if isinstance(shape, tuple):
                # the axis counted from the end survives broadcasting; a single channel is spread over all
                spread = chan is not None and shape[chan.axis] == 1
                operands.append((operand, shape, None if chan is None or spread else chan))
        known = [(operand, shape, chan) for operand, shape, chan in operands if chan is not None]
        if not known:
            return None
        lead = max(known, key=lambda item: _area(item[1], item[2].axis))
        depth = lead[2].axis - len(lead[1])
        for operand, shape, chan in operands:
            if chan is None:
                if len(shape) >= -depth and shape[depth] > 1:
                    self.spaces.freeze(lead[2].space, f"combined with {operand.name}, whose channels are unknown")
            elif chan.axis - len(shape) != depth:
                for frozen in (chan, lead[2]):
                    self.spaces.freeze(frozen.space, f"combined with {operand.name} on another axis")
            elif operand is not lead[0]:
                self.note_meeting(node, operand, lead[0], chan, lead[2])
                self.spaces.unite(chan.space, lead[2].space)
        pooled = all(chan.pooled for _, _, chan in known)
        return Chan(lead[2].space, depth + len(out), pooled)

    def note_meeting(self, node: fx.Node, operand: fx.Node, lead: fx.Node, chan: Chan, main: Chan) -> None:
        if ops.op_name(node) in ops.ADDITIONS:
            self.flow.additions.append(node)
        if ops.op_name(node) not in ops.PRODUCTS or self.spaces.find(chan.space) == self.spaces.find(main.space):
            return
        smaller = _area(shape_of(operand), chan.axis) < _area(shape_of(lead), main.axis)
        if not smaller and not chan.pooled and (main.pooled or ops.is_gate(lead, self.model)):
            operand, chan = lead, main
        if smaller or chan.pooled or ops.is_gate(operand, self.model):
            self.flow.gates.append((node, operand))
            self.spaces[chan.space].gates.extend(self.spaces[chan.space].writers)

    def op_reduce(self, node: fx.Node) -> Any:
        if len([n for n in node.args if isinstance(n, fx.Node) and shape_of(n) is not None]) > 1:
            return self.op_elementwise(node)  # torch.max(a, b)
        source = ops.first_operand(node)
        chan, shape = self.chan(source), shape_of(source)
        if chan is None:
            return self.op_opaque(node)
        dims, keepdim = ops.reduced_dims(node, len(shape))
        if dims is None:
            return self.op_opaque(node)
        if chan.axis in dims:
            if isinstance(shape_of(node), list) and not all(map(ops.takes_values, node.users)):
                return self.opaque(node, f"numbered by {ops.op_name(node)}")
            self.spaces.bind(chan.space, f"{ops.op_name(node)} looks at all of them together")
            return None  # the same for every order of the channels
        axis = chan.axis if keepdim else chan.axis - sum(dim < chan.axis for dim in dims)
        spatial = set(range(len(shape))) - {0, chan.axis}
        out = Chan(chan.space, axis, chan.pooled or spatial <= dims)
        return [out, out] if isinstance(shape_of(node), list) else out

    def op_reshape(self, node: fx.Node) -> Chan | None:
        source = ops.first_operand(node)
        chan, before, after = self.chan(source), shape_of(source), shape_of(node)
        if chan is None or not isinstance(after, tuple):
            return self.op_opaque(node)
        axis = ops.reshaped_axis(before, after, chan.axis)
        if axis is None:
            return self.opaque(node, f"split or merged with other axes by {ops.op_name(node)}")
        self.note_literal(node, chan, before[chan.axis])
        return replace(chan, axis=axis)

    def note_literal(self, node: fx.Node, chan: Chan, channels: int) -> None:
        fixed = node.op == "call_module" and isinstance(self.model.get_submodule(str(node.target)), nn.Unflatten)
        if fixed or (node.op != "call_module" and ops.names_size(node, channels)):
            self.spaces.bind(chan.space, f"{ops.op_name(node)} is written with their number")

    def op_permute(self, node: fx.Node) -> Chan | None:
        source = ops.first_operand(node)
        chan, shape = self.chan(source), shape_of(source)
        order = ops.permutation(node, len(shape)) if isinstance(shape, tuple) else None
        if chan is None or order is None:
            return self.op_opaque(node)
        return replace(chan, axis=order.index(chan.axis))

    def op_expand(self, node: fx.Node) -> Chan | None:
        source = ops.first_operand(node)
        chan, before, after = self.chan(source), shape_of(source), shape_of(node)
        if chan is None or not isinstance(after, tuple):
            return self.op_opaque(node)
        axis = chan.axis - len(before) + len(after)
        if after[axis] != before[chan.axis]:
            return None if before[chan.axis] == 1 else self.op_opaque(node)
        self.note_literal(node, chan, before[chan.axis])
        return replace(chan, axis=axis)

    def op_roll(self, node: fx.Node) -> Chan | None:
        source = ops.first_operand(node)
        chan, shape = self.chan(source), shape_of(source)
        dims = ops.int_dims(ops.argument(node, 1 if ops.op_name(node) == "flip" else 2, "dims"), len(shape or ()))
        if chan is None or dims is None or chan.axis in dims:
            return self.op_opaque(node)
        return chan

    def op_concat(self, node: fx.Node) -> Chan | None:
        shape, chans = shape_of(node), self.chans(node)
        operands = ops.argument(node, 0, "tensors")
        parts = [self.chan(n) for n in operands] if isinstance(operands, list | tuple) else []
        stacked = ops.op_name(node) == "stack"
        dims = ops.int_dims(ops.argument(node, 1, "dim", 0), len(shape) if isinstance(shape, tuple) else 0)
        if dims is None or len(dims) != 1 or not chans:
            return self.op_opaque(node)
        dim, axis = next(iter(dims)), chans[0].axis
        if not stacked and all(part is not None and part.axis == dim for part in parts):
            for part in chans:
                self.spaces.freeze(part.space, "concatenated with others along the channels")
            return self.fresh(shape[dim], dim, "a concatenation of other channels")
        if any(part is None or part.axis != axis for part in parts):
            return self.op_opaque(node)
        for part in chans[1:]:
            self.spaces.unite(chans[0].space, part.space)
        return replace(chans[0], axis=axis + 1 if stacked and dim <= axis else axis)

    def op_split(self, node: fx.Node) -> Any:
        source, shapes = ops.first_operand(node), shape_of(node)
        chan, shape = self.chan(source), shape_of(source)
        name = ops.op_name(node)
        if chan is None or not isinstance(shapes, list):
            return self.op_opaque(node)
        dims = ops.int_dims(ops.argument(node, 1 if name == "unbind" else 2, "dim", 0), len(shape))
        if dims is None or len(dims) != 1:
            return self.op_opaque(node)
        dim = next(iter(dims))
        if dim == chan.axis:
            self.opaque(node, f"taken apart by {name}")
            if name == "unbind":
                return None
            return [self.fresh(part[dim], dim, f"a part that {name} took from other channels") for part in shapes]
        axis = chan.axis - 1 if name == "unbind" and dim < chan.axis else chan.axis
        return [replace(chan, axis=axis) for _ in shapes]

    def op_getitem(self, node: fx.Node) -> Any:
        source, index = node.args[0], node.args[1]
        value = self.value(source)
        if isinstance(value, list):
            return value[index] if isinstance(index, int) else None
        if not isinstance(value, Chan):
            return self.op_opaque(node)
        axis = ops.indexed_axis(index, len(shape_of(source)), value.axis)
        if axis is not None and isinstance(shape_of(node), tuple):
            return replace(value, axis=axis)
        self.opaque(node, "sliced or indexed along the channels")
        after, before = shape_of(node), shape_of(source)
        if isinstance(after, tuple) and len(after) == len(before):
            return self.fresh(after[value.axis], value.axis, "a slice of other channels")
        return None

    def op_pad(self, node: fx.Node) -> Chan | None:
        source = ops.first_operand(node)
        chan, before, after = self.chan(source), shape_of(source), shape_of(node)
        if chan is None or not isinstance(after, tuple):
            return self.op_opaque(node)
        if after[chan.axis] == before[chan.axis] and not ops.pads_axis(node, chan.axis - len(before)):
            return chan
        self.spaces.freeze(chan.space, "padded along the channels")
        return self.fresh(after[chan.axis], chan.axis, "other channels with padding")


def _kind(form: ConvForm) -> str:
    return "transposed" if form.transposed else "grouped"


def _area(shape: tuple[int, ...], axis: int) -> int:
    """Elements per channel and image."""
    area = 1
    for dim, size in enumerate(shape):
        if dim not in (0, axis):
            area *= size
    return area
