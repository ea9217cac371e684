"""What the graph pass reports: layers, channel spaces, groups and repeats. Plain data, no tensors, no modules."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx


@dataclass(frozen=True)
class LayerRecord:
    """One convolution or Linear of the network, as it runs on the example input.

    Sizes are (height, width) in pixels of the first call; a Linear over tokens whose map is unknown has
    (tokens, 1), a volume (depth * height, width). ``stage``, ``block`` and ``role`` are explained in ``stages.py``,
    ``blocks.py`` and ``roles.py``, the channel spaces in ``spaces.py``. Without an fx graph the space ids are -1 and the
    four flags are False.
    """

    name: str
    kind: str  # "conv1d" ... "conv3d" | "conv_transpose1d" ... "conv_transpose3d" | "linear"
    module_class: str
    weight_shape: tuple[int, int, int, int]  # (O, I / groups * depth, h, w); a Linear is (O, I, 1, 1)
    groups: int
    stride: tuple[int, ...]  # as the layer has it, one a spatial axis; padding and dilation as well
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str
    bias: bool
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    stage: int
    block: str  # "" outside of blocks
    block_index: int  # -1 outside of blocks
    role: str
    calls: int
    norm: str | None  # the BatchNorm-like module that alone consumes the output
    reads_stream: bool
    writes_stream: bool
    private_input: bool
    private_output: bool
    input_space: int
    output_space: int
    depth: int = 1  # slices of a volume that a window covers
    input_shape: tuple[int, ...] = ()  # of the first call, without the batch

    @property
    def windows(self) -> int:
        """How often the weight is multiplied: once an output position, of a transposed convolution once an input position."""
        height, width = self.input_size if self.kind.startswith("conv_transpose") else self.output_size
        return height * width

    @property
    def pooled(self) -> bool:
        """True for a layer on pooled vectors: squeeze-and-excitation layers, most classifiers."""
        return self.input_size == (1, 1) and self.output_size == (1, 1)

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1] * self.groups // self.depth

    @property
    def out_channels(self) -> int:
        return self.weight_shape[0]


@dataclass(frozen=True)
class Space:
    """A set of channels that share one order: permuting them means permuting every module named here.

    ``writers`` produce the channels (output rows), ``readers`` consume them (input columns), ``through`` act on each
    channel by itself (norms, PReLU, depthwise convolutions) and hold one entry or filter a channel. ``gates`` are the
    writers whose output only multiplies the map. A frozen space cannot be permuted, for the ``reason`` given; of one that
    can, no channel may be left out where ``whole`` says why (softmax, a norm over all of them).
    """

    id: int
    channels: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    through: tuple[str, ...]
    gates: tuple[str, ...]
    frozen: bool
    reason: str
    whole: str = ""

    @property
    def stream(self) -> bool:
        """Two or more layers add into these channels: a residual stream."""
        return len(self.writers) - len(self.gates) >= 2

    @property
    def private(self) -> bool:
        """One writer, and every reader is known: the channels may be permuted alone."""
        return not self.frozen and len(self.writers) == 1


@dataclass(frozen=True)
class Group:
    """Isomorphic layers of one stage. ``role`` joins the members' roles with "+" when they differ."""

    name: str
    stage: int
    role: str
    members: tuple[str, ...]
    weight_shape: tuple[int, int, int, int]
    groups: int


@dataclass(frozen=True)
class Repeat:
    """Consecutive blocks of one structure that keep the shape of their input: one block run N times could be them."""

    name: str
    blocks: tuple[str, ...]


@dataclass
class NetworkGraph:
    """All that :func:`sharefold.graph.analyze` found out.

    Attributes:
        layers: records by qualified module name, in the order of their first call.
        skipped: weights that cannot be shared and why, by module name (free parameters by their own name).
        traced: "fx" when the data flow is known, "hooks" when only the order of calls and their shapes are.
        spaces: channel spaces by id (empty for "hooks").
        repeats: runs of equal blocks.
        blocks: blocks in forward order.
        fx_graph: the traced graph; its targets are attributes of the analysed model, which stays the one to run.
            None for "hooks", or when the trace needs constants that the model does not hold.
        trace_note: why there is no fx trace, or which part of the network it sees as one opaque step.
    """

    layers: dict[str, LayerRecord]
    skipped: dict[str, str]
    traced: str
    spaces: dict[int, Space] = field(default_factory=dict)
    repeats: list[Repeat] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    fx_graph: fx.Graph | None = field(default=None, repr=False)
    trace_note: str = ""
