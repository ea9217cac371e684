"""The graph pass: from a model and an example input to a :class:`NetworkGraph`."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from sharefold.errors import SharefoldError
from sharefold.graph.blocks import ancestors, find_blocks
from sharefold.graph.execution import LayerRun, ModuleRun, Run, run_with_hooks
from sharefold.graph.flow_roles import roles_from_flow, roles_from_run
from sharefold.graph.layers import find_layers
from sharefold.graph.preserved import preserved
from sharefold.graph.records import LayerRecord, NetworkGraph, Space
from sharefold.graph.repeats import find_repeats
from sharefold.graph.roles import find_roles
from sharefold.graph.spaces import Flow, propagate
from sharefold.graph.stages import Size, find_stages, number_blocks
from sharefold.graph.trace import ShapeRecorder, same_output, trace
from sharefold.inputs import Inputs
from sharefold.layers import STOCK_LAYERS, ConvForm
from sharefold.running import as_input, check_open, check_shapes, keep_plain

# fx patches nn.Module for the whole process while it traces.
_TRACING = threading.RLock()


def analyze(model: nn.Module, example_input: Any, *, symbolic: bool = True) -> NetworkGraph:
    """Reads the structure of ``model`` from one forward pass and, where possible, its fx graph.

    The model is left exactly as it was: modes, hooks, buffers, caches and random states. Other threads must run no network
    meanwhile, of whatever kind: fx replaces ``nn.Module.__call__`` for the whole process while it traces.

    Args:
        model: any network; its parameters may be on any device, the meta device included.
        example_input: a tensor, e.g. (1, 3, H, W); a tuple is spread over the arguments, a mapping over keywords.
            It is moved to the model's device. One image is enough.
        symbolic: False skips the fx trace and relies on hooks alone.

    Raises:
        SharefoldError: not a module, a TorchScript program, lazy modules without shapes, or the forward pass fails.
    """
    if not isinstance(model, nn.Module):
        raise SharefoldError(f"model: {type(model).__name__} is not an nn.Module: pass the network itself")
    check_open(model)
    check_shapes(model)
    if isinstance(example_input, Inputs):
        example_input = example_input.tensors
    with _TRACING, preserved(model):
        layers, skipped = find_layers(model)
        run = _first_run(model, example_input, layers)
        graph, note = _trace(model, example_input, run, set(skipped)) if symbolic else (None, "not asked for")

        def leave_out(names: Iterable[str], reason: str) -> None:
            for name in names:
                skipped[name] = reason
                del layers[name]

        for name, form in list(layers.items()):
            if (reason := _misfit(form, run.layers.get(name))) is not None:
                leave_out([name], reason)
        if graph is not None:
            leave_out(_borrowed(graph, layers), "its weight is also used by other code, outside of the module")
        flow = propagate(graph, model, layers) if graph is not None else None
        leave_out(flow.token_mixing if flow else (), "it mixes positions, not channels")
    self_contained = graph is not None and all(_has(model, n.target) for n in graph.nodes if n.op == "get_attr")
    result = _assemble(model, layers, run, flow)
    return NetworkGraph(
        layers=result,
        skipped={name: skipped[name] for name in sorted(skipped)},
        traced="hooks" if flow is None else "fx",
        spaces=flow.spaces.records() if flow else {},
        repeats=find_repeats(model, run.modules),
        blocks=list(dict.fromkeys(r.block for r in result.values() if r.block)),
        fx_graph=graph if self_contained else None,
        trace_note=note,
    )


def _first_run(model: nn.Module, example: Any, layers: dict[str, ConvForm]) -> Run:
    """As :func:`run_with_hooks`; a part of the network may want the plain order of channels, and the network gets it then."""
    try:
        return run_with_hooks(model, _copied(example, model), layers)
    except SharefoldError as error:
        if "view size is not compatible" not in str(error) or not keep_plain(model):
            raise
    return run_with_hooks(model, _copied(example, model), layers)


def _copied(value: Any, model: nn.Module) -> Any:
    """A copy as ``model`` takes it, for every run: some networks write into their input."""
    if isinstance(value, Tensor):
        return as_input(model, value)
    if isinstance(value, Mapping):
        return {key: _copied(item, model) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, model) for item in value)
    return value


def _has(model: nn.Module, target: Any) -> bool:
    found: Any = model
    for part in str(target).split("."):
        found = getattr(found, part, None)
    return found is not None


def _trace(model: nn.Module, example: Any, run: Run, unshared: set[str]) -> tuple[fx.Graph | None, str]:
    """The first trace that behaves like the network, and a note on what is missing from it."""
    if isinstance(example, Mapping | list):
        return None, "the example input is not a tensor or a tuple of tensors"
    inputs = example if isinstance(example, tuple) else (example,)
    reason = ""
    for deep in (True, False):
        try:
            graph = trace(model, len(inputs), deep=deep)
            recorder = ShapeRecorder(model, graph)
            output = recorder.run(*_copied(inputs, model))
        except Exception as error:  # anything can go wrong in foreign forward code: the hooks still stand
            lines = str(error).strip().splitlines()
            reason = reason or f"{type(error).__name__}: {lines[0] if lines else ''}"
            continue
        visible = set(recorder.called)
        hidden = [name for name in run.layers if name not in visible]
        unseen = [name for name in hidden if not visible & set(ancestors(name))]
        called = [n for n in recorder.called if isinstance(model.get_submodule(n), STOCK_LAYERS)]
        expected = [name for name in run.order if name in visible]
        if unseen or [name for name in called if name not in unshared] != expected:
            reason = reason or "the trace calls other layers than the network"
        elif not same_output(output, run.output):
            reason = reason or "the trace computes something else than the network"
        else:
            return graph, f"inside opaque modules: {', '.join(hidden)}" if hidden else ""
    return None, reason


def _misfit(form: ConvForm, run: LayerRun | None) -> str | None:
    """Why a shared layer could not stand in for a layer as it ran; None if one can."""
    if run is None:
        return "never called as a module: unused, or its weight is used by other code"
    if len(run.input_shape) + form.channel_axis < 1:
        return "it runs on one image at a time, without an axis for a batch"
    if _sized_by_call(form, run):
        return "its output_size is told where it is called, and is not the one that its statistics are taken at"
    return "it is called with its input by name, where no hook sees it" if run.by_name else None


def _sized_by_call(form: ConvForm, run: LayerRun) -> bool:
    """Whether a transposed convolution gives another size than it says by itself."""
    if form.stock is None or not form.transposed or not run.output_shape:
        return False
    rank = form.stock.rank
    return form.stock.output_size(run.input_shape[-rank:]) != run.output_shape[-rank:]


def _borrowed(graph: fx.Graph, layers: Mapping[str, ConvForm]) -> list[str]:
    """Layers whose weight some other code reads."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    return [name for name in layers if f"{name}.weight" in read]


def _assemble(model: nn.Module, layers: dict[str, ConvForm], run: Run, flow: Flow | None) -> dict[str, LayerRecord]:
    runs = {name: layer_run for name, layer_run in run.layers.items() if name in layers}
    order = list(runs)
    sizes = _sizes(runs, layers)
    pooled = _pooled(order, sizes, layers, flow)
    adders = {node.meta["owner"] for node in flow.additions} if flow else set()
    blocks, residual = find_blocks(model, order, adders, run.modules)
    shapes = {block: run.modules[block].output_shape for block in blocks.values() if block}
    whole = {block for block, shape in shapes.items() if shape is not None}
    stages = find_stages(order, {n: size[1] for n, size in sizes.items()}, pooled, blocks, whole)
    index = number_blocks(order, stages, blocks, shapes)
    spaces = flow.spaces.records() if flow else {}
    ends = {name: (_space(flow, name, "inputs"), _space(flow, name, "outputs")) for name in order}
    known = roles_from_run(runs, run.modules, layers, blocks, pooled)
    if flow is not None:
        # the graph knows shortcuts and gates better; the run still names gates hidden in opaque modules
        known = {name: role for name, role in known.items() if role != "downsample" or flow.outputs.get(name) is None}
        known.update(roles_from_flow(flow, layers, blocks, whole))
    roles = find_roles(order, layers, blocks, known, {n: size[1] for n, size in sizes.items()}, residual)
    sole = _sole_consumers(flow)
    norms = {name: _norm(name, runs[name], run.modules, sole) for name in order}
    claims = Counter(norms.values())
    norms = {name: norm if claims[norm] == 1 else None for name, norm in norms.items()}
    return {
        name: LayerRecord(
            name=name,
            **_form_fields(layers[name], model.get_submodule(name)),
            input_shape=runs[name].input_shape[1:],
            input_size=sizes[name][0],
            output_size=sizes[name][1],
            stage=stages[name],
            block=blocks[name],
            block_index=index.get(blocks[name], -1),
            role=roles[name],
            calls=runs[name].calls,
            norm=norms[name],
            **_ends(*ends[name], spaces),
        )
        for name in order
    }


def _form_fields(form: ConvForm, module: nn.Module) -> dict[str, Any]:
    told = form if form.stock is None else form.stock
    return {
        "kind": form.kind, "module_class": form.module_class, "weight_shape": form.weight_shape, "groups": form.groups,
        "stride": told.stride, "padding": "same" if form.same_pad else told.padding, "dilation": told.dilation,
        "padding_mode": told.padding_mode, "bias": module.bias is not None, "depth": form.depth,
    }  # fmt: skip


def _space(flow: Flow | None, name: str, side: str) -> int:
    chan = getattr(flow, side).get(name) if flow else None
    return -1 if chan is None or flow is None else flow.spaces.find(chan.space)


def _ends(read: int, written: int, spaces: Mapping[int, Space]) -> dict[str, Any]:
    source, target = spaces.get(read), spaces.get(written)
    return {
        "reads_stream": source is not None and source.stream,
        "writes_stream": target is not None and target.stream,
        "private_input": source is not None and source.private,
        "private_output": target is not None and target.private,
        "input_space": read,
        "output_space": written,
    }


def _sizes(runs: Mapping[str, LayerRun], layers: Mapping[str, ConvForm]) -> dict[str, tuple[Size, Size]]:
    """Input and output size of every layer; tokens get the size of the last map with as many pixels."""
    maps: dict[int, Size] = {}
    sizes: dict[str, tuple[Size, Size]] = {}
    for name, run in runs.items():
        if layers[name].convolves:
            before, after = (_map_size(layers[name], shape) for shape in (run.input_shape, run.output_shape))
            maps[before[0] * before[1]], maps[after[0] * after[1]] = before, after
        else:
            before = after = _token_size(run.input_shape[1:-1], maps)
        sizes[name] = before, after
    return sizes


def _map_size(form: ConvForm, shape: tuple[int, ...]) -> Size:
    """Height and width of a convolution's maps; signals are one pixel high, slices of volumes lie one below another."""
    axes = shape[len(shape) + form.channel_axis + 1 :]
    return math.prod(axes[:-1]), axes[-1]


def _token_size(axes: tuple[int, ...], maps: Mapping[int, Size]) -> Size:
    if len(axes) == 2:
        return axes[0], axes[1]
    count = 1
    for extent in axes:
        count *= extent
    return maps.get(count, (count, 1))


def _pooled(
    order: list[str], sizes: Mapping[str, tuple[Size, Size]], layers: Mapping[str, ConvForm], flow: Flow | None
) -> set[str]:
    """Layers whose input is a vector that a global pooling made, not a map that happens to be 1 x 1."""
    found: set[str] = set()
    area = 0
    for name in order:
        (before, after), chan = sizes[name], flow.inputs.get(name) if flow else None
        vector = before == after == (1, 1) and layers[name].kernel_size == (1, 1)
        if vector and (chan.pooled if chan is not None else layers[name].kind == "linear" or area > 1):
            found.add(name)
        else:
            area = after[0] * after[1]
    return found


def _sole_consumers(flow: Flow | None) -> dict[str, str] | None:
    """Module that alone consumes a layer's output, at every call of the layer; None without a graph."""
    if flow is None:
        return None
    consumers: dict[str, set[str]] = {}
    for node in flow.values:
        if node.op == "call_module" and str(node.target) in flow.outputs:
            users = list(node.users)
            sole = str(users[0].target) if len(users) == 1 and users[0].op == "call_module" else ""
            consumers.setdefault(str(node.target), set()).add(sole)
    return {name: next(iter(found)) for name, found in consumers.items() if len(found) == 1}


def _norm(name: str, run: LayerRun, modules: dict[str, ModuleRun], sole: dict[str, str] | None) -> str | None:
    """The BatchNorm-like module that took the output at every call and nothing else, unless the graph shows another consumer."""
    if len(run.norms) != 1 or run.norm_calls != run.calls:
        return None
    norm = next(iter(run.norms))
    if modules[norm].calls != run.calls:
        return None
    return norm if sole is None or sole.get(name, norm) == norm else None
