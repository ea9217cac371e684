"""What torch functions, tensor methods and stateless modules do to the channel axis."""

from __future__ import annotations

import re
from typing import Any

from torch import fx, nn

from sharefold.graph.layers import is_batch_norm
from sharefold.graph.trace import CHANNELWISE_SOURCES

_KEEP = """
    relu relu6 gelu silu elu selu celu leaky_relu rrelu hardswish hard_swish hardsigmoid hard_sigmoid hardtanh sigmoid
    tanh softplus softsign mish swish hard_mish quick_gelu exp log sqrt rsqrt square abs neg clamp clip reciprocal
    softmax log_softmax normalize dropout dropout1d dropout2d alpha_dropout feature_dropout drop_path stochastic_depth
    contiguous clone detach to float half double bfloat16 type type_as identity
    interpolate upsample boolean_dispatch max_pool2d avg_pool2d lp_pool2d adaptive_avg_pool2d adaptive_max_pool2d
    avg_pool1d max_pool1d lp_pool1d adaptive_avg_pool1d adaptive_max_pool1d
"""
_ELEMENTWISE = """
    add iadd sub isub rsub mul imul div truediv itruediv true_divide multiply subtract pow maximum minimum where lerp
    addcmul addcdiv fmax fmin
"""
_OTHERS = {
    "reduce": "mean sum amax amin max min std var norm logsumexp prod",
    "reshape": "view reshape flatten squeeze unsqueeze unflatten view_as reshape_as",
    "permute": "permute transpose swapaxes swapdims",
    "expand": "expand expand_as repeat",
    "roll": "roll flip",
    "concat": "cat concat concatenate stack",
    "split": "chunk split tensor_split split_with_sizes unbind",
    "nothing": "new_zeros new_ones new_empty new_full zeros_like ones_like empty_like",
    "getitem": "getitem",
    "pad": "pad",
}
FAMILY: dict[str, str] = {
    name: family
    for family, names in {"keep": _KEEP, "elementwise": _ELEMENTWISE, **_OTHERS}.items()
    for name in names.split()
}
ADDITIONS = frozenset({"add", "iadd"})
PRODUCTS = frozenset({"mul", "imul", "multiply"})

# Keep the channels and their order, but what becomes of one depends on all.
MIXING = frozenset({"softmax", "log_softmax", "normalize"})
_MIXING_MODULES = (nn.LayerNorm, nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin)

# What has windows or borders, and along how many of the last axes; along all from the third on where the name does not say.
_WINDOW, _RANK = re.compile("pool|pad|upsampl|interpolate|blur|boolean_dispatch", re.I), re.compile(r"([123])d", re.I)

_CHANNELWISE_TORCH = ("activation", "dropout", "pooling", "padding", "upsampling")
_NOT_CHANNELWISE = (nn.MultiheadAttention, nn.GLU)


def op_name(node: fx.Node) -> str:
    """Name of a function or method node; in-place variants (``relu_``) are named like the plain ones."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") else name.rstrip("_")


def argument(node: fx.Node, position: int, key: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(key, default)


def first_operand(node: fx.Node) -> fx.Node | None:
    """The node that goes in first, or None."""
    for value in (*node.args, *node.kwargs.values()):
        if isinstance(value, fx.Node):
            return value
    return None


def module_family(module: nn.Module, chan: Any, shape: Any) -> str:
    """What a module that is neither conv nor Linear does: "channelwise" (keeps the channels), "reshape" or "opaque".

    Args:
        chan: the channels of its input (with ``axis``) or None; shape: the shape of its input or None.
    """
    source = type(module).__module__
    if chan is not None and isinstance(shape, tuple):
        channels = shape[chan.axis]
        if is_batch_norm(module, channels):
            return "channelwise" if chan.axis == 1 else "opaque"
        if isinstance(module, nn.modules.batchnorm._NormBase):  # without running statistics
            return "channelwise" if module.num_features == channels and chan.axis == 1 else "opaque"
        if isinstance(module, nn.GroupNorm):
            return "channelwise" if module.num_groups in (1, channels) and chan.axis == 1 else "opaque"
        if isinstance(module, nn.LayerNorm):
            over_channels = tuple(module.normalized_shape) == (channels,)
            last = chan.axis == len(shape) - 1 or type(module).__name__.endswith("2d")
            return "channelwise" if over_channels and last else "opaque"
    if isinstance(module, nn.Identity):
        return "channelwise"
    if isinstance(module, nn.Flatten | nn.Unflatten):
        return "reshape"
    if isinstance(module, _NOT_CHANNELWISE):
        return "opaque"
    if source in CHANNELWISE_SOURCES or source in {f"torch.nn.modules.{part}" for part in _CHANNELWISE_TORCH}:
        return "channelwise"
    return "opaque"


def mixes_channels(module: nn.Module) -> bool:
    """True for a module of the family "channelwise" whose value for one channel depends on all."""
    return isinstance(module, _MIXING_MODULES) or (isinstance(module, nn.GroupNorm) and module.num_groups != module.num_channels)


def names_size(node: fx.Node, size: int) -> bool:
    """True when a reshape or expansion is written with the number ``size`` itself, not with what the input had."""
    values: list[Any] = [*node.args[1:], *node.kwargs.values()]
    while values:
        value = values.pop()
        if isinstance(value, list | tuple):
            values.extend(value)
        elif value is not True and value == size and isinstance(value, int):
            return True
    return False


def window_name(node: fx.Node, model: nn.Module) -> str:
    """The class of a module node, the name of another one."""
    return type(model.get_submodule(str(node.target))).__name__ if node.op == "call_module" else op_name(node)


def slides_along(name: str, rank: int, axis: int) -> bool:
    """True for a pooling, padding or resizing that works along ``axis``, as where 3d windows average neighbouring channels."""
    if not _WINDOW.search(name):
        return False
    said = _RANK.search(name)
    return axis >= (rank - int(said[1]) if said else 2)


def is_global_pool(node: fx.Node, model: nn.Module, before: tuple, after: tuple, axis: int) -> bool:
    """True for a pooling whose output is one value a channel."""
    name = window_name(node, model)
    spatial = [dim for dim in range(len(after)) if dim not in (0, axis)]
    if "pool" not in name.lower() and name != "boolean_dispatch":
        return False
    if any(after[dim] != 1 for dim in spatial):
        return False
    return "adaptive" in name.lower() or any(before[dim] > 1 for dim in spatial)


def is_gate(node: fx.Node, model: nn.Module) -> bool:
    """True for a value that a sigmoid-like function made: as a factor it gates the other one."""
    name = window_name(node, model)
    return node.op in ("call_module", "call_function", "call_method") and "sigmoid" in name.lower().replace("_", "")


def int_dims(value: Any, rank: int) -> set[int] | None:
    """Dimensions as a set of non-negative ints; None when they are not known at trace time."""
    dims = list(value) if isinstance(value, list | tuple) else [value]
    if not dims or not all(isinstance(dim, int) for dim in dims):
        return None
    return {dim % rank for dim in dims} if rank else None


def reduced_dims(node: fx.Node, rank: int) -> tuple[set[int] | None, bool]:
    """Dimensions that a reduction removes and whether it keeps them as 1. No dimensions given: all of them."""
    position = 2 if op_name(node) == "norm" else 1
    rest = [value for value in node.args[position:] if not isinstance(value, bool)]
    flags = [value for value in node.args[position:] if isinstance(value, bool)]
    keepdim = bool(node.kwargs.get("keepdim", flags[-1] if flags else False))
    dims = node.kwargs.get("dim", node.kwargs.get("axis"))
    if dims is None:
        dims = rest[0] if len(rest) == 1 else rest
    if dims is None or dims == []:
        return set(range(rank)), keepdim
    return int_dims(dims, rank), keepdim


def takes_values(node: fx.Node) -> bool:
    """True for a node that takes the values, and not the indices, of a reduction that gives both."""
    return op_name(node) in ("getitem", "getattr") and node.args[1] in (0, "values")


def reshaped_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where ``axis`` lies after a row-major reshape, or None when it was merged or split."""
    if before[axis] == 1:
        return None
    front = _product(before[:axis])
    size = 1
    for dim, extent in enumerate(after):
        if size == front and extent == before[axis]:
            return dim
        size *= extent
    return None


def _product(values: tuple[int, ...]) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def permutation(node: fx.Node, rank: int) -> list[int] | None:
    """Source dimension of every output dimension of a permute or transpose."""
    if op_name(node) == "permute":
        given: Any = node.kwargs.get("dims", node.args[1:])
        dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
        found = [dim % rank for dim in dims if isinstance(dim, int)]
        return found if sorted(found) == list(range(rank)) else None
    pair = [*node.args[1:], *(node.kwargs[key] for key in ("dim0", "dim1", "axis0", "axis1") if key in node.kwargs)]
    if len(pair) != 2 or not all(isinstance(dim, int) for dim in pair):
        return None
    order = list(range(rank))
    first, second = (dim % rank for dim in pair if isinstance(dim, int))
    order[first], order[second] = order[second], order[first]
    return order


def indexed_axis(index: Any, rank: int, axis: int) -> int | None:
    """Where ``axis`` lies after ``x[index]``, or None when the index cuts into it or cannot be read."""
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, fx.Node | list) for item in items):
        return None
    used = sum(item is not None and item is not Ellipsis for item in items)
    full: list[Any] = []
    for item in items if Ellipsis in items else [*items, Ellipsis]:
        full.extend([slice(None)] * (rank - used) if item is Ellipsis else [item])
    source = out = 0
    for item in full:
        if item is None:
            out += 1
            continue
        if source == axis:
            return out if item == slice(None) else None
        source += 1
        out += isinstance(item, slice)
    return None


def pads_axis(node: fx.Node, from_end: int) -> bool:
    """True when an ``F.pad`` adds to the axis ``from_end`` (-1 is the last), or when its widths are not known."""
    widths = argument(node, 1, "pad", ())
    if not isinstance(widths, list | tuple):
        return True
    if len(widths) < -2 * from_end:
        return False
    before, after = widths[-2 * from_end - 2], widths[-2 * from_end - 1]
    return not (isinstance(before, int) and isinstance(after, int) and before == after == 0)
