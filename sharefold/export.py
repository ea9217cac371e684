"""Shared networks for other programs: ONNX, a ``torch.export`` archive, or the dense state dict.

ONNX files and archives hold every shared tensor once: the composition of the weights is part of the graph. Each
file is checked against the network before it gets its name.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sharefold.calibration.images import input_config
from sharefold.checkpoint import expand
from sharefold.checksum import check_types
from sharefold.errors import SharefoldError
from sharefold.export_inputs import another, free_batch, input_names, named, random
from sharefold.export_outputs import check_returned, tensors_in
from sharefold.files import check_output, write_buffered, write_file
from sharefold.graph.layers import input_shapes
from sharefold.graph.preserved import preserved
from sharefold.inputs import Input, Inputs, Tensors, call, check_count, each_of, joined, parameters_of, taken
from sharefold.measure import model_bytes
from sharefold.onnx_codes import store_codes
from sharefold.options import ExportOptions, chosen
from sharefold.running import as_input, check_values, dtype_of, run_on
from sharefold.state_dicts import file_tensors
from sharefold.store.tensor_spec import StoreSpec, carried_spec
from sharefold.untrusted import first_line

__all__ = ["Exported", "export"]
FORMATS = {"onnx": (".onnx",), "pt2": (".pt2",), "dense": (".safetensors", ".pt", ".pth")}
# Elements. Shapes and axes are computed into the ONNX graph; a weight that is put together from shared tensors is not,
# or every layer would get a copy of what it shares.
CONSTANT_ELEMENTS = 64
PROTOBUF_LIMIT = 2**31 - 2**20
Names = tuple[tuple[str, ...], tuple[str, ...]]
# What tracing notes at every node: source lines of this machine, which nobody needs to run the graph.
_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        format: ``onnx``, ``pt2`` or ``dense``.
        bytes: size of the file.
        tensor_bytes: bytes of the network's distinct parameters and buffers.
        max_difference: largest difference between the file's outputs and the network's on random images, as a share of the
            largest number in the output.
        dynamic_batch: whether the file takes any number of images at once.
        inputs, outputs: names of the graph's inputs and outputs; none for ``dense``.
        codes: how many tensors are stored as the integers that they were rounded to.
    """

    path: Path
    format: str
    bytes: int
    tensor_bytes: int
    max_difference: float
    dynamic_batch: bool
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    codes: int = 0


def export(
    model: nn.Module, path: str | Path, format: str | None = None, example_input: Tensors | None = None,
    options: ExportOptions | None = None, **settings: Any,
) -> Exported:  # fmt: skip
    """Writes ``model`` for use without sharefold, and checks that what was written computes the same.

    Args:
        model: a converted network (any other network too, for ``onnx`` and ``pt2``); left as it was.
        path: the file.
        format: ``onnx``, ``pt2`` (read by :func:`torch.export.load`) or ``dense`` (state dict of the stock
            architecture); by default what the suffix of ``path`` says.
        example_input: (B, C, H, W), normalised, or a tuple of tensors (B, ...), whose inputs ONNX then calls by the names of
            ``forward``'s parameters; by default random, of the size in the model's configuration.
        options: what else may be chosen; ``settings`` are single fields of it (``dynamic_batch=False``).

    Raises:
        SharefoldError: unknown format, a package is missing, tensors without values, the network cannot be traced, the outputs
            differ by more than ``tolerance``, codes are asked for of a network that was not rounded, no example of signals,
            volumes or several inputs; nothing is written then.
    """
    options = chosen(options, settings, ExportOptions)
    dynamic_batch, tolerance = options.dynamic_batch, options.tolerance
    kind = format_of(path, format)
    target = check_output(path, options.force)
    check_values(model)
    codes = _codes_of(model, kind) if options.store_codes else None
    if target.is_dir():
        raise SharefoldError(f"output {target} is a folder: name a file ending in {' or '.join(FORMATS[kind])}")
    network = model if all(p.device.type == "cpu" for p in model.parameters()) else copy.deepcopy(model).cpu()
    if example_input is None:
        if 4 not in (shapes := input_shapes(network)):
            wanted = " or ".join(shapes.values())
            raise SharefoldError(f"export: the network takes {wanted}, of a size that it does not say: pass example_input")
        known, needed, _ = parameters_of(network)
        if needed > 1:
            raise SharefoldError(
                f"export: the network takes several inputs ({', '.join(known[:needed])}), of sizes that it does not say: "
                "pass example_input, a tuple of tensors"
            )
        example_input = random((2, *input_config(model)["input_size"]))
    given = taken(example_input, "export")
    check_count(network, given, "export")
    example: Input = as_input(network, given)
    example = example.each(Tensor.detach) if isinstance(example, Inputs) else example.detach()
    if dynamic_batch and kind != "dense" and len(example) < 2:
        example = joined([example, example])  # tracing would take a batch of one for a constant
    coded = 0
    with preserved(network), _calm():
        if kind == "dense":
            difference = _write_expanded(network, target, example, tolerance)
            names: Names = ((), ())
        else:
            check = [example, another(example)] if dynamic_batch else [example]
            program = _trace(network, example, dynamic_batch, kind)
            if kind == "onnx":
                difference, names, coded = _write_onnx(network, program, target, check, tolerance, codes)
            else:
                difference, names = _write_archive(network, program, target, check, tolerance)
    return Exported(
        target, kind, target.stat().st_size, model_bytes(network), difference, kind == "dense" or dynamic_batch, *names, coded
    )


def _codes_of(model: nn.Module, kind: str) -> StoreSpec:
    spec = carried_spec(model)
    if kind != "onnx":
        raise SharefoldError(f"store-codes: the format {kind} holds plain numbers: export to a file ending in .onnx")
    if spec is None:
        raise SharefoldError("store-codes: this network was not rounded: convert it with --store int8, or a budget in bytes")
    return spec


def format_of(path: str | Path, format: str | None = None) -> str:
    """The format named, or the one that the suffix of ``path`` says.

    Raises:
        SharefoldError: unknown, or a dense file whose suffix does not say how to write it.
    """
    suffix = Path(path).suffix
    if format is None:
        format = next((name for name, suffixes in FORMATS.items() if suffix in suffixes), None)
        if format is None:
            known = ", ".join(s for suffixes in FORMATS.values() for s in suffixes)
            raise SharefoldError(f"output {path}: unknown kind {suffix!r}: end it in {known}, or name the format")
    if format not in FORMATS:
        raise SharefoldError(f"export format {format!r} is not known: use {', '.join(FORMATS)}")
    if suffix not in FORMATS[format]:
        raise SharefoldError(f"output {path}: format {format} ends in {' or '.join(FORMATS[format])}")
    return format


@contextmanager
def _calm() -> Iterator[None]:
    """Exporters warn about their own deprecations and log their progress; neither is for the user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _trace(model: nn.Module, example: Input, dynamic: bool, kind: str) -> torch.export.ExportedProgram:
    tensors = each_of(example)
    shapes = free_batch(model, len(tensors)) if dynamic else None
    try:
        # Networks that keep something from call to call (grids, anchors) make it now, of real tensors; tracing finds it.
        check_returned(run_on(model, example), kind)
        program = torch.export.export(model, tensors, dynamic_shapes=shapes)
    except SharefoldError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
        by_values = any(word in str(error) for word in ("data-dependent", "control flow"))
        hint = "try a fixed batch size" if dynamic and not by_values else "its forward pass depends on values"
        raise SharefoldError(f"the network cannot be traced by torch.export ({reason}): {hint}") from error
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for note in _NOTES:
                    node.meta.pop(note, None)
    return program


def _difference(model: nn.Module, run: Callable[[Input], list[Tensor]], batches: list[Input]) -> float:
    """Largest difference of all outputs over all batches, each as a share of the largest number in it."""
    worst = 0.0
    for batch in batches:
        pairs = zip(tensors_in(call(model, batch)), run(batch), strict=True)
        worst = max([worst, *(_apart(ours.double(), theirs.double()) for ours, theirs in pairs if ours.numel())])
    return worst


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the largest finite number; infinite where one of both alone is no finite number."""
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities too, as of classes that are masked
    gap = float((ours - theirs).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).max())
    size = float(ours.abs().masked_fill(~ours.isfinite(), 0.0).max())
    return gap / size if size > 0 else gap


def _accept(difference: float, tolerance: float, what: str) -> float:
    if not difference <= tolerance:
        raise SharefoldError(
            f"{what} differs from the network by {difference:.3g} of the largest output, more than {tolerance:g}: nothing was "
            "written; raise the tolerance if that is good enough"
        )
    return difference


def _write_archive(
    model: nn.Module, program: torch.export.ExportedProgram, target: Path, batches: list[Input], tolerance: float
) -> tuple[float, Names]:  # fmt: skip
    found: list[float] = []

    def write(temporary: Path) -> None:
        # Not straight to the disk: when that is full, torch's writer ends the process.
        memory = io.BytesIO()
        try:
            torch.export.save(program, memory)
            temporary.write_bytes(memory.getbuffer())
            with temporary.open("rb") as file:
                loaded = torch.export.load(file).module()
        except OSError:
            raise
        except Exception as error:  # torch does not write all that it traces: no namedtuples, no texts
            raise SharefoldError(
                f"the network cannot be written as a torch.export archive ({first_line(error)}): return tensors in a tuple, list "
                "or dict, or try --format onnx"
            ) from error
        gap = _difference(model, lambda batch: tensors_in(call(loaded, batch)), batches)
        found.append(_accept(gap, tolerance, "the torch.export archive"))

    write_file(target, write)
    signature = program.graph_signature
    return found[0], (tuple(signature.user_inputs), tuple(str(name) for name in signature.user_outputs))


def _write_onnx(
    model: nn.Module, program: torch.export.ExportedProgram, target: Path, batches: list[Input], tolerance: float,
    codes: StoreSpec | None,
) -> tuple[float, Names, int]:  # fmt: skip
    onnx_ir, runtime = _package("onnx_ir"), _package("onnxruntime")
    outputs = tensors_in(call(model, batches[0][:1]))
    inputs = input_names(model, batches[0])
    names = ["logits"] if len(outputs) == 1 and "logits" not in inputs else [f"output_{index}" for index in range(len(outputs))]
    try:
        written = _translate(program, batches[0], inputs, names)
    except Exception as error:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise SharefoldError(f"the network cannot be written as ONNX ({lines[0][:200]}): try --format pt2") from error
    assert written is not None
    graph = written.model
    _simplify(graph)
    coded = 0 if codes is None else store_codes(graph, codes)
    stored = (value.const_value for value in graph.graph.initializers.values())
    if sum(tensor.nbytes for tensor in stored if tensor is not None) > PROTOBUF_LIMIT:
        raise SharefoldError("the network is larger than the 2 GB that one ONNX file holds: use --format pt2")
    found: list[float] = []

    def write(temporary: Path) -> None:
        onnx_ir.save(graph, temporary, format="protobuf")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        try:
            session = runtime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])

            def run(batch: Input) -> list[Tensor]:
                return [torch.from_numpy(array) for array in session.run(None, named(inputs, batch))]

            difference = _difference(model, run, batches)
        except Exception as error:  # onnxruntime's own; it has no convolution in float64 or bfloat16
            kind, reason = str(dtype_of(model)).removeprefix("torch."), " ".join(str(error).split())[:200]
            hint = "try --format pt2" if kind == "float32" else f"the network computes in {kind}: export model.float(), or pt2"
            raise SharefoldError(f"onnxruntime cannot run the network's ONNX graph ({reason}): {hint}") from error
        found.append(_accept(difference, tolerance, "the ONNX graph in onnxruntime"))

    write_file(target, write)
    return found[0], (tuple(inputs), tuple(names)), coded


def _translate(program: torch.export.ExportedProgram, example: Input, inputs: list[str], outputs: list[str]) -> Any:
    """The program as ONNX. What the exporter has no function for, as attention over five axes, is tried once more in
    torch's elementary operators; not at once, for they make longer graphs."""

    def translated(program: torch.export.ExportedProgram) -> Any:
        return torch.onnx.export(
            program, each_of(example), dynamo=True, optimize=False, verbose=False, input_names=inputs, output_names=outputs,
        )  # fmt: skip

    try:
        return translated(program)
    except torch.onnx.OnnxExporterError:
        return translated(program.run_decompositions())


def _simplify(graph: Any) -> None:
    """Inlines and computes shapes, but nothing that would copy a shared tensor: no BatchNorm fusion, no composed weight.

    onnxruntime does both in memory when it loads the file.
    """
    passes = importlib.import_module("onnx_ir.passes.common")
    optimizer = importlib.import_module("onnxscript.optimizer")

    def small(node: Any) -> bool | None:
        values = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
        return False if any(value.size > CONSTANT_ELEMENTS for value in values) else None

    passes.InlinePass()(graph)
    for _ in range(2):
        optimizer.fold_constants_ir(
            graph, onnx_shape_inference=True, output_size_limit=CONSTANT_ELEMENTS, should_fold=small
        )  # fmt: skip
        for step in (passes.IdentityEliminationPass, passes.RemoveUnusedNodesPass, passes.RemoveUnusedFunctionsPass):
            step()(graph)
    passes.RemoveUnusedOpsetsPass()(graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    _without_zero_biases(graph.graph)
    _make_contiguous(graph.graph)
    for done in (
        passes.DeduplicateHashedInitializersPass(), passes.CommonSubexpressionEliminationPass(), passes.OutputFixPass(),
        passes.RemoveUnusedNodesPass(), passes.ClearMetadataAndDocStringPass(), passes.NameFixPass(),
    ):  # fmt: skip
        done(graph)
    _name_batch(graph.graph)
    for node in graph.graph:
        node.name = None
        for value in node.outputs:  # inferred types of inner values are recomputed by every runtime
            if not value.is_graph_output():
                value.type = value.shape = None


def _without_zero_biases(graph: Any) -> None:
    """Takes away biases of nothing but zeros; onnxscript up to 0.7 gives a Conv3d without a bias one of a wrong shape."""
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and node.inputs[2] is not None and _is_zero(node.inputs[2]):
            node.resize_inputs(2)


def _is_zero(value: Any) -> bool:
    """Whether a value is zeros: a constant, or one that a larger shape was made of."""
    if value.const_value is not None:
        return not value.const_value.numpy().any()
    node = value.producer()
    return node is not None and node.op_type in ("Expand", "Cast", "CastLike") and _is_zero(node.inputs[0])


def _make_contiguous(graph: Any) -> None:
    """Copies computed constants that are views of others; the pass that finds equal ones reads their bytes in place."""
    tensor = importlib.import_module("onnx_ir").tensor
    for value in graph.initializers.values():
        array = value.const_value.numpy()
        if not array.flags.c_contiguous:
            value.const_value = tensor(array.copy(order="C"), name=value.name)


def _name_batch(graph: Any) -> None:
    """Calls the free dimension of inputs and outputs what it is; tracing makes up a name."""
    shape = importlib.import_module("onnx_ir").Shape
    traced = graph.inputs[0].shape[0]
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None and not isinstance(traced, int):
            value.shape = shape([("batch" if dim == traced else dim) for dim in value.shape])


def _package(name: str) -> Any:
    try:
        for needed in ("onnx", "onnxscript", name):
            module = importlib.import_module(needed)
    except ImportError as error:
        raise SharefoldError(f"ONNX needs the package {error.name}: pip install 'sharefold[onnx]'") from None
    return module


def write_dense(dense: nn.Module, target: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the state dict of a dense network, as safetensors or with ``torch.save`` as the suffix says.

    Args:
        dense: from :func:`sharefold.expand`, on any device; the file holds its tensors for the CPU.
        target: a file ending in .safetensors, .pt or .pth; one that is there is replaced.
        dtype: of the floating tensors in the file; by default their own.

    Raises:
        SharefoldError: another suffix, numbers that ``dtype`` cannot hold, or the file cannot be written; nothing is
            half-written.
    """
    format_of(target, "dense")
    # Clones: a tensor tied inside the stock network is written in full under each name, as its loaders expect.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in file_tensors(dense, str(target)).items()}
    if dtype is not None:
        state = {name: _cast(name, tensor, dtype) for name, tensor in state.items()}
    if target.suffix == ".safetensors":
        check_types(state, str(target))
        write_file(target, lambda temporary: save_file(state, str(temporary), {"format": "pt"}))
    else:
        write_buffered(target, lambda memory: torch.save(state, memory))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    result = tensor.to(dtype)
    if bool((torch.isfinite(tensor) & ~torch.isfinite(result)).any()):
        kind, hint = str(dtype).removeprefix("torch."), "take bf16, or " if dtype == torch.float16 else ""
        raise SharefoldError(f"expand: {name} has numbers beyond what {kind} holds: {hint}keep the type that it has")
    return result


def _write_expanded(model: nn.Module, target: Path, example: Input, tolerance: float) -> float:
    dense = expand(model)
    gap = _difference(model, lambda batch: tensors_in(call(dense, batch)), [example])
    _accept(gap, tolerance, "the dense network")
    write_dense(dense, target)
    return gap
