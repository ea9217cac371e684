"""ONNX graphs that hold tensors as the small integers that they were rounded to, and make numbers of them when they run.

Grids of up to 8 bits become int8 in front of ``DequantizeLinear``, wider ones int16 times their scales, codebooks uint8 indices
of a table of levels (``Gather``); codes of at most 4 bits lie two in a byte. Halves stay halves, vectors of them one behind the
other in a single tensor. All operators are in opset 18; codes of at most 4 bits need ``BitShift`` and ``BitwiseAnd``, which
onnxruntime has and some other runtimes lack. The graph computes from the very numbers that the network holds.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sharefold.errors import SharefoldError
from sharefold.store.tensor_spec import StoreSpec, TensorSpec

# Bytes that the nodes and the further constants of one tensor take; a tensor that saves less stays as it is.
OVERHEAD = 256
_FLOAT, _INT32 = 1, 6  # onnx.TensorProto


def store_codes(model: Any, spec: StoreSpec) -> int:
    """Replaces float initializers of an ONNX model by their codes.

    Args:
        model: an ``onnx_ir.Model``, of opset 18 or later; initializers have the names of the network's tensors. Changed in place.
        spec: how those tensors were rounded.

    Returns:
        How many tensors are stored as codes.

    Raises:
        SharefoldError: none can be.
    """
    graph = _Builder(model.graph)
    found = graph.join_vectors(list(spec.tensors))
    found += sum(graph.replace(name, entry) for name, entry in spec.tensors.items())
    if not found:
        raise SharefoldError(
            "store-codes: no float32 tensor of the graph lies on the grid that it was rounded to, or saves anything by it: "
            "export without codes, or the network as it was rounded"
        )
    return found


class _Builder:
    """Nodes in front of all others of a graph."""

    def __init__(self, graph: Any) -> None:
        self.graph, self.ir = graph, importlib.import_module("onnx_ir")
        self.first = graph[0]
        self.common: dict[str, Any] = {}  # constants that several tensors need

    def join_vectors(self, names: Sequence[str]) -> int:
        """Makes one tensor of all vectors that are the same in halves, which ``Split`` takes apart; how many they are.

        By itself a short vector would save less than its node takes.
        """
        vectors: dict[str, Any] = {}
        parts: list[np.ndarray] = []
        for name in names:
            value = self.graph.initializers.get(name)
            if value is None or value.is_graph_output() or value.shape.rank() != 1:
                continue
            halves = self._exact(value)
            if halves is not None:
                vectors[name] = value
                parts.append(halves)
        if len(parts) < 2:
            return 0
        sizes = self._constant("halves.sizes", np.array([len(part) for part in parts]))
        whole = self._node("Cast", [self._constant("halves", np.concatenate(parts))], to=_FLOAT)
        node = self.ir.node("Split", [whole, sizes], {"axis": 0}, num_outputs=len(parts))
        self.graph.insert_before(self.first, node)
        for (name, value), made in zip(vectors.items(), node.outputs, strict=True):
            self._put(name, value, made)
        return len(parts)

    @staticmethod
    def _exact(value: Any) -> np.ndarray | None:
        """The numbers of an initializer as halves, where those are the same numbers."""
        numbers = value.const_value.numpy()
        if numbers.dtype != np.float32 or not np.array_equal(halves := numbers.astype(np.float16), numbers):
            return None
        return halves

    def _put(self, name: str, value: Any, made: Any) -> None:
        self.ir.convenience.replace_all_uses_with(value, made)
        self.graph.initializers.pop(name)

    def replace(self, name: str, spec: TensorSpec) -> bool:
        """Whether the initializer ``name`` is stored as codes now."""
        value = self.graph.initializers.get(name)
        if value is None or value.is_graph_output():
            return False
        numbers = value.const_value.numpy()
        if numbers.dtype != np.float32:
            return False
        made = self._halves(name, value) if spec.kind == "fp16" else self._codes(name, numbers, spec)
        if made is not None:
            self._put(name, value, made)
        return made is not None

    def _halves(self, name: str, value: Any) -> Any:
        halves = self._exact(value)
        if halves is None or halves.nbytes < OVERHEAD:
            return None
        return self._node("Cast", [self._constant(f"{name}.half", halves)], to=_FLOAT)

    def _codes(self, name: str, numbers: np.ndarray, spec: TensorSpec) -> Any:
        if spec.kind not in ("grid", "codebook", "coded") or len(spec.scales) != len(numbers):
            return None
        matrix = torch.from_numpy(numbers.reshape(len(numbers), -1))
        codes, scales = spec.codes(matrix), spec.row_scales()
        # Constants that the exporter has changed are no longer on the grid.
        if not torch.equal(spec.values(codes, scales), matrix):
            return None
        array = codes.numpy().reshape(numbers.shape)
        column = scales.numpy().reshape(-1, *[1] * (numbers.ndim - 1))
        largest = int(np.abs(array).max())
        if spec.kind == "codebook":
            levels = np.asarray(spec.levels, dtype=np.float32)
            indices = self._unsigned(name, array, len(levels) <= 16)
            if indices is None:
                return None
            table = self._constant(f"{name}.levels", levels)
            looked_up = self._node("Gather", [table, self._node("Cast", [indices], to=_INT32)], axis=0)
            return self._node("Mul", [looked_up, self._constant(f"{name}.scale", column)])
        if largest <= 7 and (packed := self._unsigned(name, array + 8, True)) is not None:
            zero = self._constant(f"{name}.zero", np.full(len(array), 8, dtype=np.uint8))
            return self._dequantized(name, packed, column, zero)
        if largest <= 127:
            small = array.astype(np.int8)
            if numbers.nbytes - small.nbytes < OVERHEAD + column.nbytes:
                return None
            return self._dequantized(name, self._constant(f"{name}.codes", small), column)
        wide = array.astype(np.int16)
        if numbers.nbytes - wide.nbytes < OVERHEAD + column.nbytes:
            return None
        whole = self._node("Cast", [self._constant(f"{name}.codes", wide)], to=_FLOAT)
        return self._node("Mul", [whole, self._constant(f"{name}.scale", column)])

    def _dequantized(self, name: str, codes: Any, column: np.ndarray, *zero: Any) -> Any:
        return self._node("DequantizeLinear", [codes, self._constant(f"{name}.scale", column.reshape(-1)), *zero], axis=0)

    def _unsigned(self, name: str, codes: np.ndarray, two: bool) -> Any:
        """uint8 codes; where ``two`` fit a byte, the second half of the rows lies beside the first, until the graph runs. None
        where nothing is saved."""
        codes = codes.astype(np.uint8)
        size = codes.size // 2 if two else codes.size
        if 4 * codes.size - size < OVERHEAD * (2 if two else 1) + 4 * len(codes):
            return None
        if not two:
            return self._constant(f"{name}.codes", codes)
        rows, half = len(codes), -(-len(codes) // 2)
        even = np.concatenate([codes, np.zeros_like(codes[: 2 * half - rows])])
        packed = self._constant(f"{name}.codes", even[:half] | even[half:] << 4)
        low = self._node("BitwiseAnd", [packed, self._once("codes.low", np.array([15], dtype=np.uint8))])
        high = self._node("BitShift", [packed, self._once("codes.shift", np.array([4], dtype=np.uint8))], direction="RIGHT")
        both = self._node("Concat", [low, high], axis=0)
        if rows % 2:
            ends = self._once("codes.first", np.array([0])), self._once(f"codes.{rows}", np.array([rows]))
            both = self._node("Slice", [both, *ends])
        return both

    def _once(self, name: str, array: np.ndarray) -> Any:
        """A constant that several tensors need."""
        if name not in self.common:
            self.common[name] = self._constant(name, array)
        return self.common[name]

    def _constant(self, name: str, array: np.ndarray) -> Any:
        while name in self.graph.initializers:  # a tensor of the network has that name
            name += "_"
        tensor = self.ir.tensor(np.ascontiguousarray(array), name=name)
        value = self.ir.Value(name=name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _node(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        node = self.ir.node(kind, inputs, attributes)
        self.graph.insert_before(self.first, node)
        return node.outputs[0]
